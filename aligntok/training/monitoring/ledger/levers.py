"""What single changes would save in a step with our operators, run eagerly: each alone, priced on the same calls.

They do not add up: two that remove the same bytes remove them once. One line has all changes of bytes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aligntok.training.monitoring.ledger import kinds
from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.kinds import Kind
from aligntok.training.monitoring.ledger.pricing import EAGER, GRAPH
from aligntok.training.monitoring.ledger.record import BACKWARD, FORWARD, Step
from aligntok.training.monitoring.ledger.update import ADAM, AVERAGE, CLIP
from aligntok.training.monitoring.ledger.variants import (
    FUSED,
    FUSED_COMPILED,
    REFERENCE,
    Setting,
    Variant,
    in_fp8,
    priced,
)

PRODUCTS_BETTER, CONVOLUTIONS_BETTER, ATTENTION_BETTER, MEMORY_BETTER = 0.80, 0.65, 0.50, 0.95
WORTH = 5e-5  # seconds that a lever has to save to be listed


@dataclass(frozen=True)
class Lever:
    """One change and the seconds of a step that it is predicted to save."""

    name: str
    saved: float
    taken: bool = False  # it is what runs on a GPU already
    rounds: bool = False  # results are rounded otherwise: whether training bears it has to be seen


def levers(found: Sequence[Variant], fused: Step, setting: Setting) -> list[Lever]:
    """All that save something, the largest first.

    Args:
        found: the variants of the step.
        fused: the step recorded with our operators.
    """
    by_name = {variant.name: variant for variant in found}
    now = by_name[FUSED].seconds
    listed = [
        Lever("our operators in place of the PyTorch references", by_name[REFERENCE].seconds - now, taken=True),
        Lever("torch.compile of what lies between our operators", now - by_name[FUSED_COMPILED].seconds),
        Lever("a CUDA graph of the step, nothing compiled", now - priced("", fused, setting, GRAPH).seconds),
        Lever("communication hidden to the last bucket", by_name[FUSED].exposed),
    ]
    if setting.gpu.has_fp8:
        in_half = in_fp8(fused, setting.machine())
        saved = now - priced("", in_half, setting, EAGER).seconds
        listed.append(Lever("fp8 products of linear layers", saved, rounds=True))
    for name, change in {**CHANGES, TOGETHER: _together}.items():
        changed = replace(fused, calls=tuple(change(fused.calls)))
        saved = now - priced("", changed, setting, EAGER).seconds
        listed.append(Lever(name, saved, rounds=name in ROUNDING))
    for name, better in better_shares(setting).items():
        listed.append(Lever(name, now - priced("", fused, better, EAGER).seconds))
    return sorted((lever for lever in listed if lever.saved > WORTH), key=lambda lever: -lever.saved)


def better_shares(setting: Setting) -> dict[str, Setting]:
    """Settings in which one kind of work comes closer to what the GPU can do, by what that is called."""
    assumed, found = setting.assumed, {}
    for what, name, better in (
        ("matrix products", "product_share", PRODUCTS_BETTER),
        ("convolutions", "convolution_share", CONVOLUTIONS_BETTER),
        ("attention", "attention_share", ATTENTION_BETTER),
        ("memory-bound operators", "bandwidth_share", MEMORY_BETTER),
    ):
        now, unit = getattr(assumed, name), "bandwidth" if name == "bandwidth_share" else "peak"
        if now < better:
            changes: dict[str, Any] = {name: better}
            changed = replace(assumed, **changes)
            found[f"{what} at {better:.0%} of {unit} instead of {now:.0%}"] = replace(setting, assumed=changed)
    return found


def _without(kept: Callable[[Call], bool]) -> Callable[[Iterable[Call]], list[Call]]:
    return lambda calls: [call for call in calls if kept(call)]


def _weights_in_bf16(calls: Iterable[Call]) -> list[Call]:
    """No casts of weights in the forward pass; Adam writes a bf16 copy beside the fp32 weights."""
    kept = [call for call in calls if not (call.group == kinds.CASTS and call.phase == FORWARD)]
    return [_writing(call, call.writes[0].bytes // 2) if call.op == ADAM else call for call in kept]


def _gradients_in_bf16(calls: Iterable[Call]) -> list[Call]:
    """No casts of gradients; norm, clip and Adam read two bytes for each."""
    kept = [call for call in calls if not (call.group == kinds.CASTS and call.phase == BACKWARD)]
    return [_halved(call, 1) if call.group == kinds.UPDATE and call.op != AVERAGE else call for call in kept]


def _halved(call: Call, count: int) -> Call:
    """A call on lists whose first `count` tensors read, and what is written in their place, have half the bytes."""
    reads = tuple(replace(t, bytes=t.bytes // 2) if i < count else t for i, t in enumerate(call.reads))
    writes = tuple(replace(t, bytes=t.bytes // 2) for t in call.writes) if call.op == CLIP else call.writes
    return replace(call, reads=reads, writes=writes)


def _writing(call: Call, amount: int) -> Call:
    return replace(call, writes=(*call.writes, Touch(-1, len(call.writes), amount, 2)))


def _one_update(calls: Iterable[Call]) -> list[Call]:
    """Clip factor and moving average inside Adam's pass: gradients and weights are not read again."""
    kept = [call for call in calls if call.op != CLIP]
    return [replace(call, reads=call.reads[:1]) if call.op == AVERAGE else call for call in kept]


def _stream_in_bf16(calls: Iterable[Call]) -> list[Call]:
    """The residual stream in bf16: what adaLN reads and writes of it in fp32 has half the bytes."""

    def half(touches: tuple[Touch, ...]) -> tuple[Touch, ...]:
        return tuple(replace(t, bytes=t.bytes // 2, itemsize=2) if t.itemsize == 4 else t for t in touches)

    return [
        replace(call, reads=half(call.reads), writes=half(call.writes))
        if call.group == kinds.ADALN and call.kind is Kind.OWN
        else call
        for call in calls
    ]


def _swiglu_in_product(calls: Iterable[Call]) -> list[Call]:
    """SwiGLU's forward pass at the end of the product before it, which still writes what the backward pass needs."""
    return [
        replace(call, reads=())
        if call.group == kinds.SWIGLU and call.kind is Kind.OWN and call.phase == FORWARD
        else call
        for call in calls
    ]


def _together(calls: Iterable[Call]) -> list[Call]:
    """All changes of what is read and written, one after the other."""
    found = list(calls)
    for change in CHANGES.values():
        found = change(found)
    return found


STREAM, GRADIENTS = "residual stream in bf16", "gradients kept in bf16"
CHANGES: dict[str, Callable[[Iterable[Call]], list[Call]]] = {
    "bias gradients in the pass that makes their input": _without(lambda call: call.group != kinds.BIASES),
    "bf16 copies of the weights, written by Adam": _weights_in_bf16,
    GRADIENTS: _gradients_in_bf16,
    "clip and moving average inside Adam's pass": _one_update,
    STREAM: _stream_in_bf16,
    "SwiGLU in the epilogue of its product": _swiglu_in_product,
}
TOGETHER = "the changes of bytes together: " + ", ".join(
    ("bias gradients", "bf16 weights", "bf16 gradients", "one update", "bf16 stream", "SwiGLU in its product")
)
ROUNDING = (STREAM, GRADIENTS, TOGETHER)
