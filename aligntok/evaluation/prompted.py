"""Pictures on a disk with the prompts that they were drawn from, or the captions that they have.

FOLDER/prompts.jsonl      {"prompt": ..., "pictures": ["00000-0.png", ...], other keys} a line, files beside it:
                          what `aligntok sample --prompts FILE --separate true` writes
FOLDER/00000/metadata.jsonl, FOLDER/00000/samples/0000.png
                          GenEval's; the first number is the prompt's, metadata its record
FOLDER/NAME.jpg, FOLDER/NAME.txt (or both in sub-folders, which are classes)
                          real pictures with captions, the first line of each text
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
from torch import Tensor

from aligntok.data.decoding import decode
from aligntok.data.found import EXTENSIONS, is_hidden
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

    @property
    def classes(self) -> list[str] | None:
        """The "class" of each picture's record; None where a record has none."""
        found = [record.get("class") for record in self.prompts.records]
        if not all(isinstance(name, str) for name in found):
            return None
        return [str(name) for name, files in zip(found, self.files, strict=True) for _ in files]

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

    def subset(self, rows: Tensor) -> PromptedPictures:
        """The prompts of these numbers with all their pictures."""
        chosen = rows.tolist()
        texts, records = [self.prompts.texts[i] for i in chosen], [self.prompts.records[i] for i in chosen]
        prompts = replace(self.prompts, texts=texts, records=records)
        return replace(
            self, prompts=prompts, files=[self.files[i] for i in chosen], places=[self.places[i] for i in chosen]
        )


def read_picture(path: Path) -> Image.Image:
    """One picture as RGB; UserError with its name where it cannot be read."""
    try:
        return decode(path.read_bytes())
    except (OSError, UserError) as error:
        raise UserError(f"{path} cannot be read ({error}): draw it again, or take it out of the folder") from error


def open_prompted(folder: str | Path, prompts: Prompts | None = None) -> PromptedPictures:
    """The pictures of a folder, in one of the module's first two layouts.

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


def open_captioned(folder: str | Path) -> PromptedPictures:
    """Real pictures with captions: any of the module's layouts, without prompt file.

    Raises:
        UserError: no such folder, or no picture in it with a caption.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{folder} is no folder: expected pictures with captions, NAME.txt beside NAME.jpg")
    if (path / LIST).is_file():
        return _of_list(path)
    records, files, without = [], [], 0
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        shown = file.relative_to(path)
        if file.suffix.lower() not in EXTENSIONS or any(map(is_hidden, shown.parts)) or not file.is_file():
            continue
        caption = _first_line(file.with_suffix(".txt"))
        if not caption:
            without += 1
            continue
        kind = {"class": shown.parts[0]} if len(shown.parts) > 1 else {}
        records.append({"prompt": caption} | kind)
        files.append([file])
        digest.update(f"{shown.as_posix()}\n{caption}\n".encode())
    if not files:
        raise UserError(f"{folder} has {without} pictures, none with a caption: expected NAME.txt beside NAME.jpg")
    name = path.resolve().name
    prompts = Prompts(name, digest.hexdigest(), [record["prompt"] for record in records], records, without)
    return PromptedPictures(name, prompts, files, list(range(len(files))))


def _first_line(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").partition("\n")[0].strip() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): save the caption as UTF-8") from error


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
            "aligntok sample command again, which draws what is missing"
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
