"""Published checkpoints of the rivals and of LightningDiT become folders for all commands, one layout per file."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from aligntok.errors import UserError
from aligntok.runtime.files import check_destination
from aligntok.runtime.manifest import FILES

if TYPE_CHECKING:
    from aligntok.zoo.converters.conversion import Report

# What `aligntok convert --from` takes -> the module whose `convert` does it
CONVERTERS = {
    "hustvl-vavae": "aligntok.zoo.converters.vavae",
    "hustvl-lightningdit": "aligntok.zoo.converters.lightningdit",
    "rae-decoder": "aligntok.zoo.converters.rae",
    "rae-ditdh": "aligntok.zoo.converters.ditdh",
    "flux-ae": "aligntok.zoo.converters.flux",
    "diffusers-vae": "aligntok.zoo.converters.diffusers",
    "diffusers-aligntok": "aligntok.diffusers.folders",
}


def convert(layout: str, file: str, output: str, **options: str | None) -> Report | str:
    """Convert the published checkpoint `file` into the folder `output`; returns what to report.

    Args:
        options: of that layout's converter; None = not given.

    Raises:
        UserError: an unknown layout, an option that means nothing to it, an `output` that is a file or holds others,
            and what the converter raises.
    """
    if layout not in CONVERTERS:
        raise UserError(f"--from is {layout!r}, expected one of {', '.join(CONVERTERS)}")
    function = import_module(CONVERTERS[layout]).convert
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in signature(function).parameters:
            raise UserError(f"--{name} means nothing to --from {layout}: leave it out")
    check_destination(output, FILES)
    return function(Path(file), Path(output), **given)
