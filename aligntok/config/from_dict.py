"""Configuration dataclasses from nested dictionaries, as YAML files and `dataclasses.asdict` give them."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_origin, get_type_hints

from aligntok.errors import UserError


def check_keys(cls: type, data: dict[str, Any], where: str = "") -> None:
    """Refuse keys that a configuration dataclass, or one inside it, does not have; keys may be missing.

    Raises:
        UserError: an unknown key, with the nearest right name.
    """
    names = {f.name for f in fields(cls)}
    for key in data:
        if key not in names:
            close = get_close_matches(str(key), names, n=1)
            hint = f"; did you mean '{where}{close[0]}'?" if close else f"; known: {', '.join(sorted(names))}"
            raise UserError(f"unknown configuration key {where}{key}{hint}")
    hints = get_type_hints(cls)
    for key, value in data.items():
        for option in (hints[key], *get_args(hints[key])):
            if isinstance(option, type) and is_dataclass(option) and isinstance(value, dict):
                check_keys(option, value, f"{where}{key}.")


def from_dict(cls: type, data: dict[str, Any], where: str = "") -> Any:
    """Build a configuration dataclass from nested dictionaries, as `dataclasses.asdict` writes them.

    Raises:
        UserError: an unknown key (with the nearest right name) or a missing one.
    """
    names = {f.name: f for f in fields(cls)}
    check_keys(cls, data, where)
    hints = get_type_hints(cls)
    values = {key: _value(hints[key], value, f"{where}{key}.") for key, value in data.items()}
    missing = [n for n, f in names.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise UserError(f"configuration lacks {', '.join(where + name for name in missing)}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    options = [hint, *get_args(hint)]
    for option in options:
        if isinstance(option, type) and is_dataclass(option) and isinstance(value, dict):
            return from_dict(option, value, where)
    if any(get_origin(option) is tuple for option in options) and isinstance(value, list):
        return tuple(value)
    return value
