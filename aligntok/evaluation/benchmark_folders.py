"""Pictures in the layouts that the scorers of GenEval and DPG-Bench read, which are programs of their own.

    GenEval    00000/metadata.jsonl   the prompt's line of its metadata: "tag", "include", "prompt", ...
               00000/samples/0000.png and on, four of each in published numbers
    DPG-Bench  ITEM.png               one file for each prompt, by its id: pictures of equal squares, two by two, row by
                                      row; its --resolution is the side of one, its --pic-num how many count

Sources: djghosh13/geneval, README.md and evaluation/evaluate_images.py; TencentQQGYLab/ELLA, dpg_bench.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from aligntok.errors import UserError
from aligntok.evaluation.prompted import PromptedPictures, read_picture
from aligntok.runtime.files import write_bytes
from aligntok.runtime.weights import few

Progress = Callable[[int, int], None]


def check_geneval(pictures: PromptedPictures, folder: str | Path) -> None:
    """UserError unless `write_geneval` can be done; nothing is written."""
    _check_free("--geneval", folder)
    bare = [text for text, r in zip(pictures.prompts.texts, pictures.prompts.records, strict=True) if not _tagged(r)]
    if bare:
        raise UserError(
            f'--geneval: {len(bare)} prompts have no "tag" and "include" ({few(bare)}): give GenEval\'s '
            "evaluation_metadata.jsonl as --prompts"
        )


def write_geneval(pictures: PromptedPictures, folder: str | Path, progress: Progress | None = None) -> str:
    """Write GenEval's layout; returns what to do with it.

    Raises:
        UserError: see `check_geneval`; a picture that cannot be read, or a disk that refuses.
    """
    check_geneval(pictures, folder)
    done = 0
    for place, record, files in zip(pictures.places, pictures.prompts.records, pictures.files, strict=True):
        target = Path(folder) / f"{place:05d}"
        write_bytes(target / "metadata.jsonl", json.dumps(record).encode() + b"\n")
        for number, file in enumerate(files):
            data = file.read_bytes() if file.suffix == ".png" else _png(read_picture(file))
            write_bytes(target / "samples" / f"{number:04d}.png", data)
            done += 1
            if progress is not None:
                progress(done, len(pictures))
    counts = sorted({len(files) for files in pictures.files})
    told = (
        ""
        if counts == [4]
        else f"; published numbers have 4 pictures for each prompt, here {few(list(map(str, counts)))}"
    )
    return f"{folder}: {len(pictures)} pictures of {len(pictures.files)} prompts in GenEval's layout{told}"


def check_dpg(pictures: PromptedPictures, folder: str | Path) -> int:
    """Pictures of each prompt; UserError unless `write_dpg` can be done, but for the sizes of pictures."""
    _check_free("--dpg", folder)
    ids = [record.get("item_id") for record in pictures.prompts.records]
    bad = [str(name) for name in ids if not isinstance(name, str) or not name or set(name) & set("./\\")]
    if bad:
        raise UserError(
            f'--dpg: {len(bad)} prompts have no "item_id" that can name a file ({few(bad)}): give DPG-Bench\'s folder '
            "dpg_bench/prompts as --prompts"
        )
    if len(set(ids)) < len(ids):
        raise UserError(f"--dpg: {len(ids)} prompts have {len(set(ids))} ids: expected one for each")
    counts = {len(files) for files in pictures.files}
    if len(counts) > 1 or max(counts) > 4:
        raise UserError(
            f"--dpg: prompts have {few(sorted(map(str, counts)))} pictures, expected 1 to 4, as many for each"
        )
    return counts.pop()


def write_dpg(pictures: PromptedPictures, folder: str | Path, progress: Progress | None = None) -> str:
    """Write DPG-Bench's layout; a picture alone is itself, of two and three the rest of the square is black.

    Raises:
        UserError: see `check_dpg`; pictures that are not equal squares or cannot be read, or a disk that refuses.
    """
    count = check_dpg(pictures, folder)
    side = 0
    for done, (record, files) in enumerate(zip(pictures.prompts.records, pictures.files, strict=True), start=1):
        images = [read_picture(file) for file in files]
        side = side or images[0].width
        for file, image in zip(files, images, strict=True):
            if image.size != (side, side):
                raise UserError(f"--dpg: {file} has {image.width}x{image.height} px, expected {side}x{side} as others")
        whole = images[0]
        if count > 1:
            whole = Image.new("RGB", (2 * side, 2 * side))
            for number, image in enumerate(images):
                whole.paste(image, (number % 2 * side, number // 2 * side))
        write_bytes(Path(folder) / f"{record['item_id']}.png", _png(whole))
        if progress is not None:
            progress(done, len(pictures.files))
    return (
        f"{folder}: {len(pictures.files)} files in DPG-Bench's layout; its compute_dpg_bench.py reads them with "
        f"--resolution {side} --pic-num {count}"
    )


def _tagged(record: dict) -> bool:
    return isinstance(record.get("tag"), str) and isinstance(record.get("include"), list)


def _check_free(option: str, folder: str | Path) -> None:
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{option} {folder} is not empty: give a new folder, whose every file its scorer will count")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
