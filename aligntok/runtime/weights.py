"""Weight files: tensors under their names, read without executing anything that a file holds, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligntok.errors import UserError


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Names and tensors of a .safetensors or torch file that this package wrote, or that holds nothing else.

    Raises:
        UserError: no such file, one that cannot be read safely, or one without a state dict at its top.
    """
    held = read_object(Path(path).expanduser())
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{path} holds no state dict (names to tensors) at its top")
    return dict(held)


def read_object(path: Path) -> Any:
    """What a .safetensors or torch file holds, read without executing any of it.

    Raises:
        UserError: no such file, or one that cannot be read safely.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: give one of weights, .safetensors or of torch.save")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each raise their own
        if path.suffix == ".safetensors":
            raise UserError(f"{path} cannot be read ({in_short(error)}): it is damaged or incomplete") from error
        raise UserError(
            f"{path} cannot be read as weights without executing code ({in_short(error)}); save its tensors alone, as "
            ".safetensors"
        ) from error


def misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """In what the tensors of a file are not those that a module has; "" where they are."""
    misshapen = [
        f"{name} {list(given[name].shape)} instead of {list(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    return faults(
        [name for name in wanted if name not in given], [name for name in given if name not in wanted], misshapen
    )


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load `state` into `module`; UserError counts and names missing, unexpected and misshapen tensors."""
    if told := misfit(module.state_dict(), state):
        raise UserError(f"{source} belongs to another configuration: {told}")
    module.load_state_dict(state)


def faults(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """How many tensors of each kind there are, with the first names; "" for none."""
    found = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    return "; ".join(f"{len(names)} {kind}: {few(names)}" for kind, names in found.items() if names)


def few(names: list[str], limit: int = 3) -> str:
    """The first names of a list."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def in_short(error: Exception) -> str:
    """Kind of an error and its first sentence on one line; torch's go on with advice, or list every key."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0][:200]}"
