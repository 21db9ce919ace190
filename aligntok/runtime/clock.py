"""Seconds that the parts of a run took, kept in a file so that a resumed run adds up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aligntok.runtime.files import read_document, write_bytes


class Clock:
    """Seconds per part in a JSON file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = read_document(file)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to part `name`, also where it is interrupted."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            write_bytes(self.file, json.dumps(self.seconds, indent=1).encode())
