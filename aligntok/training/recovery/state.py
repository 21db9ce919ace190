"""The state of an objective as named tensors, and the two ways in which it lies in a checkpoint's folder.

    module/NAME/KEY             weights, buffers, moving averages
    optimizer/NAME/INDEX/KEY    moments and step counts of the INDEX-th parameter

One process writes `state.safetensors`. Several processes, and sharded parameters, are written by
torch.distributed.checkpoint: every process its own shards, `shard-*.safetensors`. Either is read back by any number of
processes. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from aligntok.errors import UserError
from aligntok.runtime.weights import load_strictly
from aligntok.runtime.world import current
from aligntok.training.objective import Objective

WHOLE = "state.safetensors"

State = dict[str, Tensor]


def collect(objective: Objective) -> State:
    """The state itself, not a copy."""
    state: State = {}
    for name, module in objective.modules().items():
        state |= {f"module/{name}/{key}": value.detach() for key, value in module.state_dict().items()}
    for name, optimizer in objective.optimizers().items():
        for index, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{name}/{index}/{key}": value for key, value in moments.items()}
    return state


def group_steps(objective: Objective) -> dict[str, list[int | None]]:
    """Step counts that optimizers keep per group (apex's FusedAdam), by optimizer; None where a group has none."""
    return {
        name: [int(group["step"]) if "step" in group else None for group in optimizer.param_groups]
        for name, optimizer in objective.optimizers().items()
    }


def set_group_steps(objective: Objective, counts: dict[str, list[int | None]]) -> None:
    """Put back what `group_steps` has found."""
    for name, optimizer in objective.optimizers().items():
        for group, count in zip(optimizer.param_groups, counts[name], strict=True):
            if count is not None:
                group["step"] = count


def is_sharded(state: State) -> bool:
    """Whether the state is spread over processes, or several of them hold it."""
    return current().size > 1 or any(isinstance(value, DTensor) for value in state.values())


class HostCopy:
    """Copies of a state in host memory that is kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self._buffers: State = {}
        self._stager: Any = None
        self._copied: torch.cuda.Event | None = None

    def take(self, state: State) -> State:
        """Copy a state; on a GPU the copies are queued behind its work and `ready` waits for them."""
        shards: State = {key: value for key, value in state.items() if isinstance(value, DTensor)}
        plain = {key: value for key, value in state.items() if key not in shards}
        self._buffers = {key: self._buffer(key, value) for key, value in plain.items()}
        for key, value in plain.items():
            self._buffers[key].copy_(value, non_blocking=value.is_cuda)
        if any(value.is_cuda for value in plain.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._buffers | (self._take_shards(shards) if shards else {})

    def ready(self) -> None:
        """Wait until the last copy is complete; may be called by another thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, key: str, value: Tensor) -> Tensor:
        kept = self._buffers.get(key)
        if kept is not None and kept.shape == value.shape and kept.dtype == value.dtype:
            return kept
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)

    def _take_shards(self, shards: State) -> State:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self._stager is None:
            gpu = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
            )
            self._stager = DefaultStager(options)
        return self._stager.stage(shards)


def write_whole(state: State, folder: Path) -> None:
    """Write a state of one process."""
    try:
        save_file(state, folder / WHOLE)
    except SafetensorError as error:  # how this library says that the disk is full
        raise OSError(f"{error}") from error


def write_shards(state: State, folder: Path, group: Any) -> None:
    """Write this process's part of a state; all processes of `group` call it (None = there is one process)."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            checkpoint.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    except checkpoint.CheckpointException as error:
        first = min(error.failures)
        raise OSError(f"process {first}: {error.failures[first][0]}") from error


def apply(objective: Objective, folder: Path, group: Any) -> None:
    """Load the state in `folder` into an objective.

    Raises:
        UserError: names or shapes differ from the objective's.
    """
    for optimizer in objective.optimizers().values():
        optimizer.state.clear()
    if (folder / WHOLE).is_file() and not is_sharded(collect(objective)):
        _apply_whole(objective, load_file(folder / WHOLE), folder)
    else:
        _apply_shards(objective, folder, group)


def _apply_whole(objective: Objective, state: State, folder: Path) -> None:
    for name, module in objective.modules().items():
        load_strictly(module, _below(state, f"module/{name}/"), folder)
    for name, optimizer in objective.optimizers().items():
        for key, value in _below(state, f"optimizer/{name}/").items():
            _moment(optimizer, key, value.shape, value.dtype).copy_(value)


def _apply_shards(objective: Objective, folder: Path, group: Any) -> None:
    """Through torch.distributed.checkpoint, which cuts tensors anew where the number of processes has changed."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata
    stored = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    for name, optimizer in objective.optimizers().items():
        for key, entry in _below(stored, f"optimizer/{name}/").items():
            _moment(optimizer, key, entry.size, entry.properties.dtype)
    state = collect(objective)
    wrong = sorted(state.keys() ^ stored.keys())
    wrong += [key for key in state.keys() & stored.keys() if state[key].shape != stored[key].size]
    if wrong:
        raise UserError(f"{folder} belongs to another configuration: {wrong[0]} differs ({len(wrong)} in all)")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        checkpoint.load(state, storage_reader=reader, process_group=group, no_dist=group is None)


def _moment(optimizer: torch.optim.Optimizer, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros in the optimizer's state for INDEX/KEY.

    Moments are laid out (and sharded) like their parameter, which fused kernels rely on; step counts lie where the
    optimizer wants them.
    """
    index, name = key.split("/")
    group, parameter = [(g, p) for g in optimizer.param_groups for p in g["params"]][int(index)]
    if shape == parameter.shape:
        room = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    else:
        on_device = group.get("fused") or group.get("capturable")
        room = torch.zeros(shape, dtype=dtype, device=parameter.device if on_device else "cpu")
    optimizer.state[parameter][name] = room
    return room


def _below(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
