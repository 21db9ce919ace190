"""What decides the course of a run: a checkpoint goes on only with the same.

Images and weights are known by what they are, wherever they lie and however their place is spelled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from aligntok.config import DataConfig, TrainingConfig
from aligntok.runtime.devices import Precision
from aligntok.runtime.files import digest

FRESH = "new"  # what begins with this stands for networks that a part has not got from another
# Of the data's configuration: where the images lie and how fast they come, not which they are
INDIFFERENT = ("path", "workers", "loader", "stall_timeout")
# Of the data's configuration what older runs did not know, with the value that does what they did
ADDED = {"data.captions": None, "data.buckets": "none"}


def course(training: TrainingConfig, precision: Precision, data: DataConfig, **others: Any) -> dict[str, Any]:
    """Everything that decides the course of a run, as {dotted name: value}.

    The precision is what is computed in, where the recipe says "auto" too; images are ImageSet.identity() as
    `image_set`; see `by_content` for weights.
    """
    values = {
        "data": {key: value for key, value in dataclasses.asdict(data).items() if key not in INDIFFERENT},
        "training": {key: getattr(training, key) for key in ("batch_size", "seed", "optimizer")}
        | {"precision": precision.name},
        **others,
    }
    return json.loads(json.dumps({key: by_content(key, value) for key, value in _flat(values)}))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from _flat(part, f"{name}.{key}" if name else key)


def by_content(key: str, value: Any) -> Any:
    """A hash in the place of a file or folder of weights that is there; every other value as it is."""
    if not (key.endswith("weights") and isinstance(value, str) and value):
        return value
    place = Path(value).expanduser()
    files = [place] if place.is_file() else sorted(file for file in place.glob("*.*") if file.is_file())
    if not files:
        return value
    states = ((file, file.stat()) for file in files)
    every = "".join(_digest_once(str(file), state.st_size, state.st_mtime_ns) for file, state in states)
    return f"sha256 {hashlib.sha256(every.encode()).hexdigest()[:16]}"


@cache
def _digest_once(file: str, size: int, changed: int) -> str:
    return digest(file)
