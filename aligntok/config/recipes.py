"""Recipe files: YAML, each optionally on top of another.

    base: imagenet256_f16d32            a path relative to this file, or the name of a recipe that ships
    tokenizer: {model: {adapter: {latent_channels: 64}}}

Mappings of a file are merged into those of its base, key by key; every other value replaces the base's. A file may hold
any part of a `Recipe`; what no file says keeps the default of aligntok.config.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from aligntok.config import Recipe
from aligntok.config.from_dict import check_keys
from aligntok.errors import UserError

BASE = "base"


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name: "quickstart", "ablations/w_sp_0"."""
    folder = Path(str(files("aligntok.configs")))
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(found.items()))


def recipe_path(name: str, beside: Path | None = None) -> Path:
    """File of a recipe given by path or by the name of a shipped one.

    Args:
        name: a path, with or without .yaml, or a name that ships.
        beside: folder that relative paths start from; None = the current one.

    Raises:
        UserError: neither exists.
    """
    for path in (Path(name).expanduser(), Path(f"{name}.yaml").expanduser()):
        path = path if beside is None else beside / path
        if path.is_file():
            return path
    known = shipped()
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"no recipe {name!r}: not a file, and not one of {', '.join(known)}{hint}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The values of a recipe file with those of its bases underneath.

    Raises:
        UserError: no YAML mapping, an unknown key, a base that is missing or that leads back; the file is named.
    """
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    here = path.resolve()
    if here in above:
        chain = " -> ".join(p.name for p in (*above[above.index(here) :], here))
        raise UserError(f"{path}: its base leads back to it ({chain}); remove one `{BASE}:`")
    values = _parse(path)
    name = values.pop(BASE, None)
    try:
        check_keys(Recipe, values)
        if name is None:
            return values
        if not isinstance(name, str):
            raise UserError(f"{BASE} is {name!r}, expected the name or the path of one recipe")
        base = recipe_path(name, beside=here.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return merge(_read(base, (*above, here)), values)


def _parse(path: Path) -> dict[str, Any]:
    from jsonargparse import get_loader
    from yaml import YAMLError

    try:
        values = get_loader("yaml")(path.read_text())  # reads 1e-4 as a number, as the command line does
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, expected a mapping such as `data: {{path: FOLDER}}`")
    return values


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mappings merged key by key."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
