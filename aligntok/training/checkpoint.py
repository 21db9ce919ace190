"""Training checkpoints: exact, atomic, checked.

A checkpoint is a folder `step-000400` with `state.safetensors` (weights, buffers, moving averages, optimizer moments)
and `state.json` (step, checksum, names of the numbers). Random numbers and data position need no saving: both are
functions of the seed and the step. A folder that is incomplete or fails its checksum is named, passed over and the
one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from aligntok.collectives import on_main
from aligntok.errors import UserError
from aligntok.files import write_folder_bytes
from aligntok.models.tokenizer import load_strictly
from aligntok.training.distributed import complete, share_out
from aligntok.training.objective import Objective


class Checkpoints:
    """The checkpoints of one training part, oldest first.

    Args:
        folder: where they lie; made on the first save.
        keep: how many to keep.
        fingerprint: hash of everything that decides the course of the run; another run's checkpoint is refused.
    """

    def __init__(self, folder: Path, keep: int, fingerprint: str) -> None:
        self.folder, self.keep, self.fingerprint = folder, max(1, keep), fingerprint

    def save(self, step: int, objective: Objective) -> Path:
        """Write the state after `step` steps; older checkpoints are removed only when the new one is on disk.

        Raises:
            UserError: the disk refuses; every earlier checkpoint is still there.
        """
        state = _collect(objective)
        return on_main(lambda: self._write(step, state))

    def _write(self, step: int, state: dict[str, Tensor]) -> Path:
        data = save(state)
        document = {"step": step, "fingerprint": self.fingerprint, "sha256": hashlib.sha256(data).hexdigest()}
        target = self.folder / f"step-{step:08d}"
        write_folder_bytes(target, {"state.safetensors": data, "state.json": json.dumps(document).encode()})
        for old in self._existing()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def restore(self, objective: Objective) -> int:
        """Load the newest sound checkpoint into `objective`; returns the steps done, 0 where there is none.

        Raises:
            UserError: the checkpoint was made with another configuration.
        """
        for folder in reversed(self._existing()):
            try:
                document = json.loads((folder / "state.json").read_text())
                data = (folder / "state.safetensors").read_bytes()
            except (OSError, ValueError) as error:
                warnings.warn(f"checkpoint {folder} cannot be read ({error}); using the one before it", stacklevel=2)
                continue
            if hashlib.sha256(data).hexdigest() != document["sha256"]:
                warnings.warn(f"checkpoint {folder} is damaged (checksum); using the one before it", stacklevel=2)
                continue
            if document["fingerprint"] != self.fingerprint:
                raise UserError(
                    f"checkpoint {folder} was made with another configuration or other images: give another output "
                    f"folder, or remove {self.folder} to start over"
                )
            _apply(objective, load(data), folder)
            return document["step"]
        return 0

    def remove(self) -> None:
        """Delete all of them, once the part's result is on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _existing(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def fingerprint(*parts: Any) -> str:
    """Short hash of anything that prints the same for the same run."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _collect(objective: Objective) -> dict[str, Tensor]:
    state = {}
    for name, module in objective.modules().items():
        state |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in objective.optimizers().items():
        for index, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{name}/{index}/{key}": value for key, value in moments.items()}
    return {key: complete(value.detach()).cpu().contiguous() for key, value in state.items()}


def _apply(objective: Objective, state: dict[str, Tensor], source: Path) -> None:
    for name, module in objective.modules().items():
        own = module.state_dict()
        given = _below(state, f"module/{name}/")
        load_strictly(module, {k: share_out(v, own[k]) if k in own else v for k, v in given.items()}, source)
    for name, optimizer in objective.optimizers().items():
        _load_moments(optimizer, _below(state, f"optimizer/{name}/"))


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load_moments(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Fill the optimizer's state; moments take the memory layout of their parameter, which fused kernels rely on."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in flat.items():
        index, name = key.split("/")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(share_out(value, parameter))
        optimizer.state[parameter][name] = value
