"""One run on several processes: torchrun starts them, DDP or FSDP2 keeps their weights alike.

Every process takes its rows of every batch and the mean of its losses; all have the same number of rows, so the mean
over processes is that of the whole batch. DDP and FSDP2 wrap the loss of a phase instead of a network: whatever the
loss computes on its way, its gradient is averaged while the backward pass still runs.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from aligntok.config import TrainingConfig
from aligntok.data.sources import Batch
from aligntok.errors import UserError
from aligntok.runtime import collectives
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.world import World, current
from aligntok.training.objective import Phase, Values

# The others wait this long for the first process, which may download weights meanwhile; torchrun ends them at once
# when it dies.
TIMEOUT = timedelta(minutes=30)
# Where processes meet only now and then: the wait lasts as long as the slowest works
LONG_TIMEOUT = timedelta(days=30)
# PyTorch renames the option and warns of the old name.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


@contextmanager
def start(device: str, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Join the processes that torchrun has started; without torchrun, or inside another `start`, do nothing.

    On CUDA a process takes the device of its local rank. After an exception the group is left to the end of the
    process, which may not wait for processes that are gone.

    Raises:
        UserError: `device` names one GPU for all processes, or is neither cpu nor cuda.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield current()
        return
    if ":" in device:
        raise UserError(f"training.device is {device!r} under torchrun, expected auto, cuda or cpu")
    kind = choose_precision(device).device.type
    if kind not in ("cpu", "cuda"):
        raise UserError(f"training.device is {kind!r} under torchrun, expected cuda or cpu: use training.device=cpu")
    if kind == "cuda":
        local, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= seen:
            raise UserError(f"process {local} of this machine has no GPU, {seen} are seen: use --nproc-per-node {seen}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timeout)
    yield current()
    dist.destroy_process_group()


class Trained(nn.Module):
    """The modules that a phase trains; forward(loss) is loss(), so that DDP and FSDP2 see the whole computation."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, loss: Callable[[], tuple[Tensor, Values]]) -> tuple[Tensor, Values]:
        return loss()


def replicate(parts: Mapping[str, nn.Module]) -> nn.Module:
    """`parts` behind DDP, every process with all weights; as they are in a single process."""
    trained = Trained(parts)
    if current().size == 1:
        return trained
    # Buffers agree by themselves: BatchNorm's statistics are those of the whole batch.
    options: dict[str, Any] = {_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(trained, **options)


def shard(parts: Mapping[str, nn.Module]) -> nn.Module:
    """`parts` behind FSDP2, every process with a share of each weight, block by block.

    A part's blocks are gathered one at a time. What lies around them is small and stays whole between forward and
    backward, so that the adaptive weight can be taken at the decoder's last layer.
    """
    # FSDP2 warns of in-place changes to what a module returns as a view; ours are read only.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    trained = Trained(parts)
    kind = next(trained.parameters()).device.type
    mesh = init_device_mesh(kind, (current().size,))
    for part in parts.values():
        part.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other layout
        for block in _blocks(part):
            fully_shard(block, mesh=mesh)
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    fully_shard(trained, mesh=mesh)
    return trained


def _blocks(part: nn.Module) -> Iterable[nn.Module]:
    """A generator's, of every kind that it has; an encoder's."""
    of_generator = getattr(part, "transformer_blocks", None)
    return getattr(part, "blocks", ()) if of_generator is None else of_generator()


def is_sharded(mode: str) -> bool:
    """Whether `training.parallel` asks for FSDP2 and there is more than one process.

    Raises:
        UserError: an unknown mode.
    """
    if mode not in ("ddp", "fsdp"):
        raise UserError(f"training.parallel is {mode!r}, expected ddp or fsdp")
    return mode == "fsdp" and current().size > 1


def complete(value: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out; every process has to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather(module: nn.Module, everywhere: bool = True) -> dict[str, Tensor]:
    """The module's state with whole tensors on the CPU; every process has to ask.

    Args:
        everywhere: False = the first process alone has it, and the others nothing: the host's memory holds it once.
    """
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        whole = complete(value.detach())
        if everywhere or current().main:
            state[name] = whole.cpu()
    return state


def gradients(phase: Phase, batch: Batch) -> tuple[Tensor, Values]:
    """Backward passes of a phase over this process's rows, in `phase.accumulate` micro-batches.

    Every micro-batch starts from the step's random state, so that what is drawn for a row does not depend on how the
    rows are divided.

    Returns:
        the loss, a mean over micro-batches and processes; values, means over micro-batches.
    """
    if phase.trained is None and current().size > 1:
        raise UserError(f"phase {phase.name} trains in a single process only: start it without torchrun")
    parts = split(batch, phase.accumulate)
    losses: list[Tensor] = []
    sums: Values = {}
    for index, part in enumerate(parts):
        torch.manual_seed(torch.initial_seed())
        with _synchronised(phase.trained, last=index == len(parts) - 1):
            compute = partial(phase.loss, part)
            loss, values = compute() if phase.trained is None else phase.trained(compute)
            (loss / len(parts)).backward()
        losses.append(loss.detach())
        sums = {key: sums.get(key, 0) + value / len(parts) for key, value in values.items()}
    return collectives.mean(torch.stack(losses).mean()), sums


def check_batches(training: TrainingConfig) -> None:
    """Raise UserError unless a batch can be divided over the processes and into micro-batches; before anything is read.

    Each process has to call it.
    """
    check_accumulate(training.accumulate, len(current().rows(training.batch_size)))


def check_accumulate(parts: int, count: int) -> None:
    """Raise UserError unless the `count` rows that a process has of a batch are divided evenly."""
    if parts < 1 or count % parts:
        raise UserError(
            f"training.accumulate is {parts}, expected a divisor of the {count} rows that each process has of a batch: "
            f"use {' or '.join(map(str, near_divisors(parts, count)))}"
        )


def near_divisors(number: int, count: int) -> list[int]:
    """The divisors of `count` on both sides of a number that is none, without those that are not there."""
    divisors = [divisor for divisor in range(1, count + 1) if count % divisor == 0]
    return [d for d in divisors if d < number][-1:] + [d for d in divisors if d > number][:1]


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in `parts` equal runs of rows.

    Raises:
        UserError: the rows cannot be divided evenly.
    """
    count = len(batch["labels"])
    check_accumulate(parts, count)
    pieces = {key: value.split(count // parts) for key, value in batch.items()}
    return [{key: piece[index] for key, piece in pieces.items()} for index in range(parts)]


def _synchronised(trained: nn.Module | None, last: bool) -> AbstractContextManager:
    """Gradients are averaged over processes after the last micro-batch only."""
    if isinstance(trained, FSDPModule):
        trained.set_requires_gradient_sync(last)
    if isinstance(trained, DistributedDataParallel) and not last:
        return trained.no_sync()
    return nullcontext()
