"""Files of prompts: texts to draw pictures from, with whatever else a benchmark says of each, and the file's hash.

    .txt    a prompt a line                              .jsonl  {"prompt": ..., other keys}: GenEval's metadata
    .tsv    a table with a column Prompt: PartiPrompts   .json   COCO captions ("annotations"), or a list: HPSv2
    folder  of NAME.txt, each one prompt: DPG-Bench; NAME is the record's "item_id"

Everything is UTF-8; a byte order mark is passed over. Prompts without a character are left out and counted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aligntok.errors import UserError

KINDS = '.txt (a prompt a line), .jsonl ({"prompt": ...} a line), .tsv (a column Prompt) or .json (COCO\'s captions)'
Record = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """Prompts of one file, in its order.

    Attributes:
        name: of the file or folder, without its path.
        sha256: of the file's bytes; of names and bytes of a folder's files.
        texts: the prompts, stripped of white space around them.
        records: for each of them everything that the file says, "prompt" among it.
        empty: prompts without a character, which were left out.
        chosen: which part of the file this is; "" = all of it.
    """

    name: str
    sha256: str
    texts: list[str]
    records: list[Record]
    empty: int = 0
    chosen: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def protocol(self) -> str:
        """Name, number and hash: printed beside every number that was measured with these prompts."""
        told = f"prompts {self.name}, n={len(self)}{self.chosen and f', {self.chosen}'}, sha256 {self.sha256[:16]}"
        return told + (f", {self.empty} empty ones left out" if self.empty else "")

    def choose(self, count: int, seed: int = 0) -> Prompts:
        """`count` of them, drawn without repetition and kept in the file's order; all of them if there are as many.

        Raises:
            UserError: there are fewer, or none is asked for.
        """
        if not 1 <= count <= len(self):
            raise UserError(f"{count} prompts were asked for, and {self.name} has {len(self)}: give 1 to {len(self)}")
        if count == len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
        chosen = f"drawn from {len(self)} with seed {seed}"
        texts, records = [self.texts[i] for i in order], [self.records[i] for i in order]
        return replace(self, texts=texts, records=records, chosen=chosen)


def read_prompts(file: str | Path) -> Prompts:
    """The prompts of a file or folder; see the module's docstring for what is read.

    Raises:
        UserError: nothing there, another kind of file, another encoding than UTF-8, a line that cannot be read (with
            its number), or no prompt at all.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        found, data = _of_folder(path)
    elif path.is_file():
        data = _bytes(path)
        found = _of_file(path, _text(path, data))
    else:
        raise UserError(f"there is no file of prompts {file}: expected {KINDS}, or a folder of .txt files")
    kept = [record for record in found if record["prompt"]]
    if not kept:
        held = f"only empty prompts ({len(found)})" if found else "nothing"
        raise UserError(f"{file} holds {held}, expected prompts: {KINDS}")
    texts = [record["prompt"] for record in kept]
    return Prompts(path.resolve().name, hashlib.sha256(data).hexdigest(), texts, kept, len(found) - len(kept))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): give a readable file of prompts"
        ) from error


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} cannot be read): save it with that encoding"
        ) from error


def _of_file(path: Path, text: str) -> list[Record]:
    readers = {".txt": _of_lines, ".jsonl": _of_json_lines, ".json": _of_json, ".tsv": _of_table}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is no file of prompts by its name: expected {KINDS}")
    return reader(path, text)


def _of_folder(folder: Path) -> tuple[list[Record], bytes]:
    """Records of a folder's .txt files by name, numbers by size, and what is hashed for them."""
    files = [file for file in folder.glob("*.txt") if not file.name.startswith(".")]
    files.sort(key=lambda file: (not file.stem.isdecimal(), int(file.stem) if file.stem.isdecimal() else 0, file.name))
    found, hashed = [], b""
    for file in files:
        data = _bytes(file)
        found.append({"prompt": " ".join(_text(file, data).split()), "item_id": file.stem})
        hashed += f"{file.name}\n".encode() + hashlib.sha256(data).digest()
    return found, hashed


def _lines(text: str) -> list[str]:
    """Lines without their ends; other separators than line feeds belong to a prompt."""
    lines = [line.strip() for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _of_lines(path: Path, text: str) -> list[Record]:
    return [{"prompt": line} for line in _lines(text)]


def _of_json_lines(path: Path, text: str) -> list[Record]:
    found = []
    for number, line in enumerate(_lines(text), start=1):
        place = f"{path}, line {number}"
        found.append(_record(_parsed(line, place), place) if line else {"prompt": ""})
    return found


def _of_json(path: Path, text: str) -> list[Record]:
    if not text.strip():
        return []
    held = _parsed(text, str(path))
    if isinstance(held, dict) and isinstance(held.get("annotations"), list):
        return [_record(item, f"{path}, annotation {n}", "caption") for n, item in enumerate(held["annotations"])]
    if isinstance(held, list):
        items = [{"prompt": item} if isinstance(item, str) else item for item in held]
        return [_record(item, f"{path}, item {n}") for n, item in enumerate(items)]
    raise UserError(f'{path} has no "annotations" as COCO\'s captions have, and is no list of prompts: expected one')


def _of_table(path: Path, text: str) -> list[Record]:
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    column = next((name for name in table.fieldnames or () if name.strip().lower() == "prompt"), None)
    if column is None:
        if not text.strip():
            return []
        raise UserError(
            f"{path} has no column Prompt in its first line: expected a table with names, separated by tabs"
        )
    rest = [{k: v for k, v in row.items() if k not in (None, column)} | {"prompt": row[column]} for row in table]
    return [_record(row, f"{path}, row {n}") for n, row in enumerate(rest, start=1)]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place} is no JSON ({error}): correct it") from error


def _record(item: Any, place: str, key: str = "prompt") -> Record:
    """`item` with its text under "prompt", stripped."""
    if not isinstance(item, dict) or not isinstance(item.get(key), str):
        raise UserError(f'{place} has no text under "{key}": expected {{"{key}": "..."}}')
    return item | {"prompt": item[key].strip()}
