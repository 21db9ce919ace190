"""From the words of a command line to a recipe or to the options of a command, with mistakes in one line.

jsonargparse does the work: typed dataclasses give options, help and checks. Recipes lie beneath it with their bases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from os.path import expanduser
from typing import TYPE_CHECKING, Any, NoReturn

from aligntok.errors import UserError

if TYPE_CHECKING:
    from aligntok.config import Recipe


def parse_recipe(
    command: str, arguments: list[str], default_recipe: str | None = None, epilog: str | None = None
) -> Recipe:
    """The recipe of a command line: defaults, then --config files with their bases, then dotted overrides."""
    from aligntok.config import Recipe

    return _parse(command, Recipe, arguments, config_files=True, default_recipe=default_recipe, epilog=epilog)


def parse_options(
    command: str, cls: type, arguments: list[str], usage: str | None = None, shown: dict[str, str] | None = None
) -> Any:
    """The options of a command without recipe.

    Args:
        usage: what help says in place of a list of options.
        shown: names of options -> how help and errors call them.
    """
    return _parse(command, cls, arguments, config_files=False, usage=usage, shown=shown)


def _parse(
    command: str,
    cls: type,
    arguments: list[str],
    config_files: bool,
    default_recipe: str | None = None,
    epilog: str | None = None,
    usage: str | None = None,
    shown: dict[str, str] | None = None,
) -> Any:
    from jsonargparse import ArgumentParser

    from aligntok.config.from_dict import from_dict
    from aligntok.config.recipes import read_recipe, recipe_path

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(_renamed(_one_line(message, self), shown)) from ex

        def format_help(self, *formatter: Any, **named: Any) -> str:
            return _renamed(super().format_help(*formatter, **named), shown)

    description = (cls.__doc__ or "").split("\n")[0]
    parser = Parser(
        prog=f"aligntok {command}",
        usage=usage,
        description=f"{description} {epilog or ''}".strip(),
    )
    if config_files:
        parser.add_argument("--config", action="config", help="a recipe: YAML file, or the name of one that ships")
        arguments = _resolve_recipes(arguments)
    parser.add_class_arguments(cls)
    if default_recipe is not None:
        parser.set_defaults(_dotted(read_recipe(recipe_path(default_recipe))))
    values = parser.parse_args(arguments).as_dict()
    values.pop("config", None)
    given = {key: value for key, value in values.items() if not key.startswith("__")}
    return from_dict(cls, at_home(given))


def at_home(value: Any) -> Any:
    """A value of the command line or of a recipe with "~" at the front of every path in it spelled out.

    The shell does so for words of their own only, and not for `--output=~/x` or inside YAML.
    """
    if isinstance(value, dict):
        return {key: at_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [at_home(part) for part in value]
    return expanduser(value) if isinstance(value, str) else value


def _renamed(text: str, names: dict[str, str] | None) -> str:
    """`text` with other names, which are padded to the old ones' width where a column follows."""
    for old, new in (names or {}).items():
        text = text.replace(f"{old}  ", f"{new:{len(old)}}  ").replace(old, new)
    return text


def _dotted(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _dotted(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def _resolve_recipes(arguments: list[str]) -> list[str]:
    """Every --config FILE as --config VALUES, the values being those of the file with its bases underneath."""
    import json

    from aligntok.config.recipes import read_recipe, recipe_path

    resolved = list(arguments)
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            resolved[index + 1] = json.dumps(read_recipe(recipe_path(arguments[index + 1])))
        elif argument.startswith("--config="):
            values = read_recipe(recipe_path(argument.removeprefix("--config=")))
            resolved[index] = "--config=" + json.dumps(values)
    return resolved


def _one_line(message: str, parser: Any) -> str:
    """jsonargparse's message on one line, with the nearest known option for an unknown one."""
    text = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --(?P<key>[^ =]+)", text)
    unknown = unknown or re.search(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'", text)
    if unknown is None:
        return text
    key = ".".join(part for part in (unknown.groupdict().get("group"), unknown["key"]) if part)
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    return text + nearest(key, known)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that is like it, if there is one."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
