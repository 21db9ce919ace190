"""Which network a rival is, and whether the finished tokenizer of a folder is the one that is asked for."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from aligntok.config import RivalConfig
from aligntok.errors import UserError
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime.manifest import Manifest
from aligntok.zoo.maetok import MAETok
from aligntok.zoo.rae import RAE
from aligntok.zoo.vae import VAE


def network_of(config: RivalConfig) -> tuple[type[StoredTokenizer], Any]:
    """Class and configuration of the tokenizer that a rival is."""
    if config.kind == "rae":
        return RAE, config.rae
    if config.kind == "maetok":
        return MAETok, config.maetok
    if config.kind in ("vae", "va-vae", "repa-e"):
        return VAE, config.vae
    raise UserError(f"rival.kind is {config.kind!r}, expected vae, va-vae, rae, maetok or repa-e")


def check_finished(folder: Path, config: RivalConfig) -> None:
    """Refuse a finished tokenizer that is not the one that is asked for.

    Of an encoder's `weights` a stored "random" is taken for any: a tokenizer that was read and saved again, as
    `aligntok statistics` does, brings them itself. VA-VAE differs from VAE by its losses alone, which are not stored.

    Raises:
        UserError: what lies there, and what was asked for.
    """
    manifest, (kind, settings) = Manifest(folder, "tokenizer"), network_of(config)
    advice = "give another --output"
    if manifest.format != kind.format:
        raise UserError(
            f"{folder} holds a finished {manifest.format or 'folder of no known format'}, and rival.kind "
            f"{config.kind} makes {kind.format}: {advice}"
        )
    if config.kind == "repa-e" and config.repa_e.tokenizer is not None:
        return  # its configuration is that of the tokenizer that it went on with
    # As config.json has it: what load_tokenizer builds has forgotten the encoder's weights
    configurations = manifest.value("config", kind.config_class), settings, kind.offline(copy.deepcopy(settings))
    stored, asked, offline = (_located(as_stored(each)) for each in configurations)
    if stored not in (asked, offline):
        told = difference(stored, asked)
        raise UserError(f"{folder} is a finished {config.kind} of other settings: {told}; {advice}")


def as_stored(settings: Any) -> dict[str, Any]:
    """A configuration as it is read from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _located(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with files of weights by where they are: the same one may be given as w.pth and as /data/w.pth."""
    found = {key: _located(value) if isinstance(value, dict) else value for key, value in settings.items()}
    if isinstance(path := found.get("weights"), str) and Path(path).exists():
        found["weights"] = os.path.realpath(path)
    return found


def difference(stored: dict[str, Any], asked: dict[str, Any], where: str = "") -> str:
    """The first value in which two configurations differ, as `NAME is VALUE there, VALUE was asked for`."""
    absent = "absent"
    key = next(key for key in {**asked, **stored} if stored.get(key, absent) != asked.get(key, absent))
    there, wanted = stored.get(key, absent), asked.get(key, absent)
    if isinstance(there, dict) and isinstance(wanted, dict):
        return difference(there, wanted, f"{where}{key}.")
    return f"{where}{key} is {there!r} there, {wanted!r} was asked for"
