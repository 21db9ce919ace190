"""config.json of a tokenizer's or a generator's folder, in which every fault is one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from aligntok.config.from_dict import from_dict
from aligntok.errors import UserError
from aligntok.runtime.weights import in_short

T = TypeVar("T")
VERSION = 1  # of what StoredTokenizer.save and save_generator write
FILES = ("config.json", "model.safetensors")  # which is this


class Manifest:
    """The values of a folder's config.json.

    Args:
        what: what is looked for there, in messages.

    Raises:
        UserError: config.json is missing, or is not a JSON object.
    """

    def __init__(self, folder: str | Path, what: str) -> None:
        self.file = Path(folder) / "config.json"
        if not self.file.is_file():
            raise UserError(
                f"no {what} at {folder}: config.json is missing; give a folder that training or convert has written"
            )
        try:
            self.values: dict[str, Any] = json.loads(self.file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file} cannot be read as JSON ({in_short(error)})") from error
        if not isinstance(self.values, dict):
            raise UserError(f"{self.file} is a {type(self.values).__name__} in JSON, expected an object of settings")

    @property
    def format(self) -> str:
        """Which kind of folder it says that this is; "" where it says nothing of the sort."""
        found = self.values.get("format")
        return found if isinstance(found, str) else ""

    def check_version(self) -> None:
        """Refuse what another version of this package has written."""
        if (found := self.value("version", int)) != VERSION:
            raise UserError(f"{self.file} is of version {found}, this package reads version {VERSION}")

    def value(self, key: str, kind: Any) -> Any:
        """The value of a key, a configuration built where `kind` is its dataclass.

        Args:
            kind: as in a dataclass's annotations.

        Raises:
            UserError: no such key, unknown or missing keys inside, or values of another type.
        """
        if key not in self.values:
            raise UserError(f"{self.file} lacks {key!r}: it is incomplete")
        found = self.values[key]
        if told := _fault(kind, found, key):
            raise UserError(f"{self.file}: {told}")
        return self.build(lambda: from_dict(kind, found)) if isinstance(kind, type) and is_dataclass(kind) else found

    def build(self, make: Callable[[], T]) -> T:
        """What `make` builds from the values; where they make it impossible, a UserError that names the file."""
        try:
            return make()
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from error
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.file}: no network has these sizes ({in_short(error)})") from error


def _fault(kind: Any, value: Any, where: str) -> str | None:
    """What is wrong with the type of a JSON value, naming the first one inside that does not fit."""
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        inside = (_fault(hints[key], part, f"{where}.{key}") for key, part in value.items() if key in hints)
        return next((fault for fault in inside if fault), None)
    if _fits(kind, value):
        return None
    expected = "settings" if is_dataclass(kind) else kind.__name__ if isinstance(kind, type) else str(kind)
    return f"{where} is {value!r}, expected {expected.replace('typing.', '')}"


def _fits(kind: Any, value: Any) -> bool:
    """Whether a JSON value is of an annotated type: a list stands for a tuple, an int for a float."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(option, value) for option in inside)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in inside)
    if origin in (tuple, list):
        if not isinstance(value, list):
            return False
        if origin is tuple and inside[-1] is not Ellipsis:
            return len(value) == len(inside) and all(map(_fits, inside, value))
        return all(_fits(inside[0], part) for part in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
