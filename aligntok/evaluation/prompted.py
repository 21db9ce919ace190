"""Pictures on a disk with the prompts that they were drawn from, in one of two layouts.

    FOLDER/prompts.jsonl      {"prompt": ..., "pictures": ["00000-0.png", ...], other keys} a line, files beside it:
                              what `aligntok sample --prompts FILE --separate true` writes
    FOLDER/00000/metadata.jsonl, FOLDER/00000/samples/0000.png
                              GenEval's; the first number is the prompt's, metadata its record

Nothing is read of a picture before it is asked for, but every file that is named has to be there.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from aligntok.data.decoding import decode
from aligntok.data.images import Entry, ImageSet
from aligntok.errors import UserError
from aligntok.evaluation.prompts import Prompts, Record, read_prompts
from aligntok.runtime.weights import few

LIST = "prompts.jsonl"


@dataclass(frozen=True)
class PromptedPictures:
    """Prompts and the files of their pictures.

    Attributes:
        name: of the folder, without its path.
        prompts: those that have pictures, with their records; its hash is that of the file that named them.
        files: the pictures of each prompt, in order.
        places: number of each prompt in its file, empty ones not counted.
    """

    name: str
    prompts: Prompts
    files: list[list[Path]]
    places: list[int]

    def __len__(self) -> int:
        """Number of pictures."""
        return sum(map(len, self.files))

    @property
    def texts(self) -> list[str]:
        """The prompt of each picture."""
        return [text for text, files in zip(self.prompts.texts, self.files, strict=True) for _ in files]

    def images(self) -> ImageSet:
        """All pictures, in order, as a set without classes."""
        paths = [path for files in self.files for path in files]
        return ImageSet(self.name, [Entry(path.name, path, 0) for path in paths], ["all"])

    def batches(self, size: int) -> Iterator[tuple[list[Image.Image], list[str]]]:
        """RGB pictures with their prompts, `size` at a time, read as they are asked for.

        Raises:
            UserError: a picture cannot be read.
        """
        paths, texts = [path for files in self.files for path in files], self.texts
        for start in range(0, len(paths), size):
            yield [read_picture(path) for path in paths[start : start + size]], texts[start : start + size]


def read_picture(path: Path) -> Image.Image:
    """One picture as RGB; UserError with its name where it cannot be read."""
    try:
        return decode(path.read_bytes())
    except (OSError, UserError) as error:
        raise UserError(f"{path} cannot be read ({error}): draw it again, or take it out of the folder") from error


def open_prompted(folder: str | Path, prompts: Prompts | None = None) -> PromptedPictures:
    """The pictures of a folder, in one of the module's layouts.

    Args:
        folder: the folder.
        prompts: the file that they were drawn from; its records and its hash take the place of the folder's own. Every
            prompt of the folder has to be in it, as often.

    Raises:
        UserError: another layout, pictures that are named and not there, a prompt without one, or other prompts.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"--pictures {folder} is no folder: expected what aligntok sample --prompts writes, or GenEval's"
        )
    if (path / LIST).is_file():
        found = _of_list(path)
    elif numbered := sorted(
        (p for p in path.iterdir() if p.is_dir() and p.name.isdecimal()), key=lambda p: int(p.name)
    ):
        found = _of_geneval(path, numbered)
    else:
        raise UserError(
            f"{folder} has no {LIST} (which aligntok sample --prompts FILE --separate true writes) and no numbered "
            "folders with metadata.jsonl and samples/ (GenEval's layout): nothing says which prompt a picture has"
        )
    return found if prompts is None else _matched(found, prompts)


def _of_list(folder: Path) -> PromptedPictures:
    prompts = read_prompts(folder / LIST)
    files = []
    for text, record in zip(prompts.texts, prompts.records, strict=True):
        names = record.get("pictures")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f'{folder / LIST}: the prompt {text!r} has no "pictures": expected a list of file names')
        files.append([folder / name for name in names])
    missing = [str(file.relative_to(folder)) for found in files for file in found if not file.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the pictures that {folder / LIST} names are not there ({few(missing)}): give the same "
            "aligntok sample command again"
        )
    records = [{key: value for key, value in record.items() if key != "pictures"} for record in prompts.records]
    prompts = replace(prompts, name=f"{folder.resolve().name}/{LIST}", records=records)
    return PromptedPictures(folder.resolve().name, prompts, files, list(range(len(files))))


def _of_geneval(folder: Path, numbered: list[Path]) -> PromptedPictures:
    records, files, digest = [], [], hashlib.sha256()
    for place in numbered:
        records.append(_metadata(place / "metadata.jsonl"))
        digest.update((place / "metadata.jsonl").read_bytes().strip() + b"\n")
        found = [p for p in place.glob("samples/*.png") if p.stem.isdecimal() and p.is_file()]
        if not found:
            raise UserError(f"{place / 'samples'} has no pictures: expected 0000.png and so on, as GenEval names them")
        files.append(sorted(found, key=lambda p: int(p.stem)))
    name = folder.resolve().name
    prompts = Prompts(f"{name}/*/metadata.jsonl", digest.hexdigest(), [r["prompt"] for r in records], records)
    return PromptedPictures(name, prompts, files, [int(place.name) for place in numbered])


def _metadata(file: Path) -> Record:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): expected the prompt's line of GenEval's metadata") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f"{file} has no text under \"prompt\": expected the prompt's line of GenEval's metadata")
    return record | {"prompt": record["prompt"].strip()}


def _matched(found: PromptedPictures, prompts: Prompts) -> PromptedPictures:
    """`found` with the records and places of a file of prompts, equal ones in their order."""
    waiting: dict[str, deque[int]] = {}
    for number, text in enumerate(prompts.texts):
        waiting.setdefault(text, deque()).append(number)
    places = []
    for text in found.prompts.texts:
        if not waiting.get(text):
            raise UserError(
                f"{found.name} has pictures of the prompt {text!r}, which {prompts.name} does not have"
                f"{' so often' if text in waiting else ''}: give the file that they were drawn from"
            )
        places.append(waiting[text].popleft())
    order = torch.tensor(places).argsort().tolist()
    places = [places[i] for i in order]
    chosen = "" if len(places) == len(prompts) else f"{len(places)} of its {len(prompts)} prompts have pictures"
    taken = replace(
        prompts,
        texts=[prompts.texts[place] for place in places],
        records=[found.prompts.records[i] | prompts.records[place] for i, place in zip(order, places, strict=True)],
        chosen=chosen or prompts.chosen,
    )
    return PromptedPictures(found.name, taken, [found.files[i] for i in order], places)


def refuse_unreadable(images: ImageSet) -> None:
    """UserError where a generated picture could not be read: it would be missing from every count."""
    for name, reason in images.skipped.items():
        raise UserError(
            f"{len(images.skipped)} pictures cannot be read, {name} for example ({reason}): draw them again"
        )
