"""The operators of one training step, recorded on the meta device in the order in which a GPU would get them.

A real objective takes a real step, as in aligntok.training.monitoring.cost, under a dispatch mode that writes down
every operator: what it reads and writes, its FLOPs, the kernels that it launches. Our own operators are looked into:
their Triton launches, and what they do in PyTorch beside them. An operator of the backward pass belongs where the
operator of the forward pass belongs whose node it is computed for.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map_only

from aligntok.kernels import use_implementation
from aligntok.kernels._triton import Launch, record_launches
from aligntok.training.monitoring.ledger import kinds, update
from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.kinds import Kind, Scope
from aligntok.training.monitoring.meta_device import Built
from aligntok.training.monitoring.meter import Flops, formula_of

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Step:
    """A recorded step of one process: one micro-batch forward and backward in each phase, then the updates."""

    calls: tuple[Call, ...]
    kept: frozenset[int]  # storages that outlive it: gradients
    flops: int  # forward and backward
    trained: int  # bytes of the weights that change
    micro_batch: int


def record(built: Built, implementation: str, architecture: int) -> Step:
    """Record the first step of an objective; inside `meta_device.on_meta`.

    Args:
        implementation: of our operators: "auto", which on a GPU is Triton, or "reference".
        architecture: of kernels/_triton.py's ARCHITECTURES, whose block sizes are taken.
    """
    weights = {id(p): p for part in built.parts.values() for p in part.parameters()}
    trained = 0
    with record_launches(architecture) as launches:
        recorder = Recorder(weights.values(), launches)
        for phase in built.objective.phases(0):
            phase.clear()
            with use_implementation(implementation), recorder, warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                loss, values = phase.loss(built.batch)
                loss.backward()
            recorder.calls += update.of_phase(phase)
            trained += sum(p.numel() * p.element_size() for p in phase.parameters)
            del loss, values
    for module in built.objective.modules().values():
        if isinstance(module, AveragedModel):
            recorder.calls += update.of_averages(module)
    gradients = (p.grad for p in weights.values() if p.grad is not None)
    kept = frozenset(recorder.number(gradient) for gradient in gradients)
    return Step(tuple(recorder.calls), kept, recorder.flops, trained, len(built.batch["labels"]))


class _Own:
    """One of our operators that is being looked into."""

    def __init__(self, func: Any, inputs: Sequence[Tensor], scope: Scope, known: int) -> None:
        self.func, self.inputs, self.scope = func, inputs, scope
        self.known = known  # storages from this number on are made inside
        self.call: int | None = None  # where its first launches are written down
        self.name = func.overloadpacket.__name__
        self.kind = Kind.OWN_ATTENTION if self.name.startswith(kinds.OWN_ATTENTIONS) else Kind.OWN


class Recorder(Flops):
    """Writes down every operator inside: `calls`.

    Args:
        weights: all parameters, whose casts are told from others.
        launches: what `record_launches` collects into.
    """

    def __init__(self, weights: Iterable[Tensor], launches: list[Launch]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._launches = launches
        self._numbers: dict[int, int] = {}  # of living storages, by address
        self._count = 0
        self._weights = {self.number(weight) for weight in weights}
        self._scopes: dict[int, Scope] = {}  # of the forward pass, by the number of the autograd node
        self._own: list[_Own] = []  # the innermost last

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage; addresses are used again, numbers are not."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = self._count
            self._count += 1
            weakref.finalize(storage, self._numbers.pop, key, None)
        return self._numbers[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        node = torch._C._current_autograd_node()
        scope = self._own[-1].scope if self._own else self._scope(func, args, node)
        phase = FORWARD if node is None else BACKWARD
        self._flush(phase)
        definition = OPDEFS.get(func.name().removesuffix(".default"))
        if definition is not None:
            return self._look_into(func, definition._abstract_fn, args, kwargs, scope, phase)
        before = self.flops
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket in kinds.CONVOLUTIONS_OF_PYTORCH:
            result = _in_layout(result, args)
        self._add(func, args, kwargs, result, scope, phase, self.flops - before)
        return result

    def _scope(self, func: Any, args: tuple, node: Any) -> Scope:
        """Where an operator belongs. The node of an operator of the forward pass is made just before it is called."""
        cast = func is torch.ops.aten._to_copy.default and self.number(args[0]) in self._weights
        found = kinds.scope(sys._getframe(2), kinds.is_product(func), cast)
        if node is None:
            self._scopes.setdefault(torch._C._autograd._get_sequence_nr() - 1, found)
            return found
        return found if found.of_a_model else self._scopes.get(node._sequence_nr(), found)

    def _add(self, func: Any, args: tuple, kwargs: dict, result: Any, scope: Scope, phase: str, flops: int) -> None:
        """Write down an operator of PyTorch."""
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        kind = kinds.kind(func, inputs, outputs, args, kwargs)
        call = Call(
            func.overloadpacket.__name__,
            kinds.shapes(inputs or outputs),
            phase,
            self._group(kind, func, scope, phase),
            kind,
            flops=flops,
            work=kinds.attention_work(func, inputs) if kind is Kind.ATTENTION else 1.0,
            launches=kinds.launches(func, kind, args),
            dtype=kinds.operands(inputs),
        )
        if call.launches:
            given = [x for x in inputs if not _only_written(func, x, args)]
            call = replace(call, reads=self._touches(given), writes=self._touches(outputs))
        self.calls += self._passes(func, call, result) or [call]
        if kind is Kind.CONVOLUTION and phase == FORWARD and args[2] is not None:  # a pass of its own in PyTorch
            touched = self._touches(outputs)
            self.calls.append(replace(call, op="add_", kind=Kind.POINTWISE, reads=touched, writes=touched, flops=0))

    def _passes(self, func: Any, call: Call, result: Any) -> list[Call]:
        """The passes of an operator that makes several: each reads what the one before has written, too."""
        found: list[Call] = []
        for kind, outputs in kinds.passes(func):
            writes = self._touches(x for i in outputs if isinstance(x := result[i], Tensor))
            before = found[-1].writes if found else ()
            if writes:
                found.append(replace(call, kind=kind, reads=(*call.reads, *before), writes=writes))
        return found

    def _group(self, kind: Kind, func: Any, scope: Scope, phase: str) -> str:
        """What an operator of PyTorch serves; beside our attention's kernels that is attention."""
        if self._own and self._own[-1].kind is Kind.OWN_ATTENTION:
            return kinds.ATTENTION
        return kinds.group(kind, func, scope, phase == BACKWARD)

    def _look_into(self, func: Any, body: Any, args: tuple, kwargs: dict, scope: Scope, phase: str) -> Any:
        """Write down the launches of one of our operators, and what it does in PyTorch beside them."""
        inputs, before = _tensors((args, kwargs)), self.flops
        self._touches(inputs)  # those that no operator has seen are numbered before what is made inside
        own = _Own(func, inputs, scope, self._count)
        formula = formula_of(func)
        counted = 0 if formula is None else formula(*args, **kwargs)
        self._own.append(own)
        with self:
            result = body(*args, **kwargs)
        self._flush(phase)
        self._own.pop()
        beside, self.flops = self.flops - before, before + max(counted, self.flops - before)
        if own.call is not None and counted > beside:
            self.calls[own.call] = replace(self.calls[own.call], flops=counted - beside)
        return result

    def _flush(self, phase: str) -> None:
        """Write down the launches of the innermost of our operators since the last time, as one call."""
        launched = [self._touches(_tensors(launch.arguments)) for launch in self._launches]
        self._launches.clear()
        if not launched or not self._own:
            return
        own = self._own[-1]
        if own.call is None:
            own.call = len(self.calls)
        call = Call(
            own.name,
            kinds.shapes(own.inputs),
            phase,
            kinds.group(own.kind, own.func, own.scope, phase == BACKWARD),
            own.kind,
            reads=tuple(touch for touches in launched for touch in touches if touch.storage < own.known),
            writes=tuple(touch for touches in launched for touch in touches if touch.storage >= own.known),
            work=kinds.attention_work(own.func, own.inputs) if own.kind is Kind.OWN_ATTENTION else 1.0,
            launches=len(launched),
            dtype=kinds.operands(own.inputs),
        )
        self.calls.append(call)

    def _touches(self, tensors: Iterable[Tensor]) -> tuple[Touch, ...]:
        """What is touched, everything once."""
        found = (Touch(self.number(x), int(x.storage_offset()), kinds.size(x), x.element_size()) for x in tensors)
        return tuple(dict.fromkeys(found))


def _in_layout(result: Any, args: tuple) -> Any:
    """What a convolution returns with its channels last where cuDNN's would have them so; on meta they never are."""
    if not any(x.is_contiguous(memory_format=torch.channels_last) for x in args[:3] if isinstance(x, Tensor)):
        return result
    return tree_map_only(Tensor, _channels_last, result)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _only_written(func: Any, tensor: Tensor, args: tuple) -> bool:
    """Whether an operator overwrites a tensor without reading it."""
    return func.overloadpacket.__name__ in ("copy_", "fill_", "zero_") and tensor is args[0]
