"""Folders of pictures with prompts, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_picture(path: Path, number: int, size: int = 32) -> None:
    """A picture of random blocks that is another for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(blocks.repeat(size // 4, 0).repeat(size // 4, 1)).save(path)


def write_sampled(folder: Path, records: list[dict], each: int = 2, size: int = 32) -> Path:
    """What `aligntok sample --prompts FILE --separate true` writes, of records with a prompt."""
    lines = []
    for number, record in enumerate(records):
        names = [f"{number:05d}-{i}.png" for i in range(each)]
        for i, name in enumerate(names):
            write_picture(folder / name, each * number + i, size)
        lines.append(json.dumps(record | {"pictures": names}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
