"""Where a non-finite value comes from, found out after the fact.

The phase's forward pass is run once more, with the same batch and random numbers and a hook on every layer. The first
layer whose output is not finite although its input is, is the one; where the forward pass is sound, it is the layer
whose gradient went bad first on the way back. Nothing of this runs in a sound step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves

from aligntok.data.sources import Batch
from aligntok.runtime.world import current
from aligntok.training.objective import Objective, Phase

GRADIENT = "gradient"
SOUND = "a second forward pass of the same batch was finite"


class Finding(NamedTuple):
    layer: str
    what: str

    def __str__(self) -> str:
        return f"{self.layer} ({self.what})"


class RandomState:
    """torch's random numbers at one moment, on the CPU and the current GPU; taking it does not wait for the GPU."""

    def __init__(self) -> None:
        gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cpu_state = torch.get_rng_state()
        self.gpu_state = torch.cuda.get_rng_state() if gpu else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Context in which the same numbers are drawn again; outside of it nothing changes."""
        with torch.random.fork_rng(devices=[] if self.gpu_state is None else [torch.cuda.current_device()]):
            torch.set_rng_state(self.cpu_state)
            if self.gpu_state is not None:
                torch.cuda.set_rng_state(self.gpu_state)
            yield


def locate(objective: Objective, phase: Phase, batch: Batch, random: RandomState) -> Finding:
    """The first layer that is to blame for a non-finite loss or gradient; gradients must still be there, unclipped."""
    names = {module: name for name, module in _named_modules(objective)}
    gradients = _bad_gradients(objective, phase)
    with _Watch(names) as watch, random.again(), torch.compiler.set_stance("force_eager"):
        compute = partial(phase.loss, batch)
        values = (compute() if phase.trained is None else phase.trained(compute))[
            1
        ]  # by every process, whatever it has found: losses may communicate
    for key, value in batch.items():
        if not _finite(value):
            rows = torch.nonzero(~value.reshape(len(value), -1).isfinite().all(1)).flatten()
            pictures = batch["index"][rows.cpu()].tolist()
            return Finding(f"batch[{key!r}]", f"input, rows {rows.tolist()}, pictures {pictures}")
    if watch.found is not None:
        return _blame_weight(watch.found, {name: module for module, name in names.items()})
    for key, value in values.items():
        if not _finite(value):
            return Finding(f"loss part {key!r}", "every layer before it is finite")
    if gradients:
        last = max(gradients, key=lambda name: watch.position(name))
        return Finding(last, GRADIENT)
    for name, parameter in _named_parameters(objective):
        if not _finite(parameter):
            return Finding(name, "weight")
    return Finding("the loss itself", SOUND)


def to_blame(found: Finding, pictures: list[int]) -> tuple[Finding, list[int]]:
    """Of what every process has found in its rows, the cause, with the pictures in the rows of that process.

    A process whose own rows are sound sees only the mean gradient of all: it has the last word.
    """
    if current().size == 1:
        return found, pictures
    all_found: list[Any] = [None] * current().size
    distributed.all_gather_object(all_found, (*found, pictures))
    layer, what, pictures = min(all_found, key=lambda one: one[1] in (GRADIENT, SOUND))
    return Finding(layer, what), pictures


def worst_gradients(objective: Objective, phase: Phase, count: int = 10) -> list[dict[str, Any]]:
    """The largest gradient norms of a phase, non-finite ones first."""
    wanted = {id(p) for p in phase.parameters}
    norms: list[dict[str, Any]] = [
        {"name": name, "norm": float(_local(p.grad).norm())}
        for name, p in _named_parameters(objective)
        if id(p) in wanted and p.grad is not None
    ]
    norms.sort(key=lambda entry: entry["norm"] if math.isfinite(entry["norm"]) else math.inf, reverse=True)
    return norms[:count]


class _Watch:
    """Hooks on all layers that note the order of calls and the first non-finite value."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.found: Finding | None = None
        self._order: dict[str, int] = {}
        self._open: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for module in self.names:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def position(self, parameter: str) -> int:
        """When the layer of a parameter was last entered; that of the nearest layer around it, where it is not called
        itself."""
        name = parameter
        while name and name not in self._order:
            name = name.rpartition(".")[0]
        return self._order.get(name, -1)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = self.names[module]
        if self.found is None and not _finite((args, kwargs)):
            if self._open:
                self.found = Finding(self._open[-1], f"its own computation, before {name}")
            else:
                self.found = Finding(f"input of {name}", "not finite when it gets there")
        self._open.append(name)
        self._order[name] = len(self._order)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        name = self._open.pop()
        if self.found is None and not _finite(output):
            self.found = Finding(name, "output")


def _blame_weight(found: Finding, modules: dict[str, nn.Module]) -> Finding:
    """The weight inside a layer that is not finite itself, if there is one; else what was found."""
    module = modules.get(found.layer)
    for key, value in module.state_dict().items() if module is not None else ():
        if not _finite(value):
            return Finding(f"{found.layer}.{key}", "weight")
    return found


def _bad_gradients(objective: Objective, phase: Phase) -> list[str]:
    wanted = {id(p) for p in phase.parameters}
    return [
        name
        for name, p in _named_parameters(objective)
        if id(p) in wanted and p.grad is not None and not _finite(p.grad)
    ]


def _named_modules(objective: Objective) -> Iterator[tuple[str, nn.Module]]:
    return _named(objective, nn.Module.named_modules)


def _named_parameters(objective: Objective) -> Iterator[tuple[str, nn.Parameter]]:
    return _named(objective, nn.Module.named_parameters)


def _named(objective: Objective, list_of: Callable[..., Iterator[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """Names with that of the part in front; averages (`ema`) are never run."""
    for part, module in objective.modules().items():
        if part != "ema":
            yield from list_of(module, prefix=part)


def _finite(values: Any) -> bool:
    tensors = (_local(v) for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point())
    return all(bool(t.isfinite().all()) for t in tensors)


def _local(value: Tensor) -> Tensor:
    """This process's shard of a distributed tensor."""
    return value.to_local() if hasattr(value, "to_local") else value
