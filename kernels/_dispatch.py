"""Which implementation of an operator runs, and why not another.

An operator registers its implementations in order of preference, each with a check that returns None or the
reason why it cannot run on a device. The request comes from, first found first taken: the argument
`implementation=`, the context manager `use_implementation`, the environment variable ALIGNTOK_KERNELS, else
`auto`.

- `auto` takes the first implementation without a reason; the PyTorch reference is last and has none. It never
  takes Triton's interpreter, which is for tests and a thousand times slower than anything else.
- Any other request is met or refused with the list of reasons. Nothing else runs in its place.
- A call may bring reasons of its own against an implementation (a dtype, a head width): `unfit`.
- Inside forward-mode differentiation and the transforms of torch.func the compiled implementations have a reason
  against them, whatever the tensors: they would pass a tangent by in silence. The PyTorch reference is composite and
  follows every transform.
- `assume_device` answers for another kind of device than the tensors have: memory for a GPU is counted on fake
  tensors, which carry the CPU's name where no GPU is.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

AUTO, REFERENCE = "auto", "reference"
NAMES = (AUTO, "triton", "cpp", REFERENCE)
ENVIRONMENT_VARIABLE = "ALIGNTOK_KERNELS"

Check = Callable[[torch.device], "str | None"]
Unfit = tuple[tuple[str, str], ...]  # (implementation, reason) pairs that one call adds
TRANSFORMED = (
    "inside forward-mode differentiation and the transforms of torch.func (jvp, vmap, grad, ...) only "
    'implementation="reference" is right'
)


@dataclass(frozen=True)
class Selection:
    """The outcome for one operator on one device."""

    op: str
    device: str
    requested: str
    name: str | None  # None: the request cannot be met
    rejected: dict[str, str]  # implementation -> reason, in order of preference


_registry: dict[str, dict[str, Check]] = {}
_in_context: ContextVar[str | None] = ContextVar("aligntok_implementation", default=None)
_assumed: ContextVar[str | None] = ContextVar("aligntok_assumed_device", default=None)
# Checks look at the device's type and at what is installed. Neither changes while the process lives.
_selected: dict[tuple[str, str, str, Unfit, bool], str] = {}


def register(op: str, **implementations: Check) -> None:
    """Register an operator's implementations, the preferred one first; `reference` is added as the last.

    Each check takes a device and returns None if the implementation runs there, else the reason as a sentence
    part.
    """
    assert set(implementations) <= {"triton", "cpp"}, implementations
    _registry[op] = {**implementations, REFERENCE: lambda device: None}
    for key in [key for key in _selected if key[0] == op]:
        del _selected[key]


def operators() -> tuple[str, ...]:
    """The registered operators, in alphabetical order."""
    return tuple(sorted(_registry))


def _validated(name: str, origin: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{origin}: unknown implementation {name!r}; expected one of {', '.join(NAMES)}")
    return name


def _request(implementation: str | None) -> str:
    if implementation is not None:
        return _validated(implementation, "implementation")
    in_context = _in_context.get()
    if in_context is not None:
        return in_context
    return _validated(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)


def requested() -> str:
    """The implementation that a call without one of its own asks for now: by context, environment, or "auto"."""
    return _request(None)


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Request an implementation (`auto`, `triton`, `cpp`, `reference`) for every operator called inside the
    block.

    The request belongs to the calling thread. A graph that torch.compile traced keeps the choice made while
    tracing.

    Raises:
        ValueError: `name` is unknown. Whether an operator can meet the request is checked when it is called.
    """
    token = _in_context.set(_validated(name, "use_implementation"))
    try:
        yield
    finally:
        _in_context.reset(token)


@contextmanager
def assume_device(device_type: str) -> Iterator[None]:
    """Choose as on another device, for fake tensors: they have shapes and dtypes, and nothing runs on them."""
    token = _assumed.set(device_type)
    try:
        yield
    finally:
        _assumed.reset(token)


@torch.compiler.assume_constant_result
def device_type(kind: str) -> str:
    """`kind`, the type of a tensor's device ("cpu", "cuda"), or what `assume_device` says instead."""
    return _assumed.get() or kind


@torch.compiler.assume_constant_result
def transformed() -> bool:
    """Whether the call is made inside forward-mode differentiation or a transform of torch.func (jvp, vmap, grad, ...).

    It looks at no tensor and takes a tenth of a microsecond; torch has no public question for this. torch.compile asks
    while it traces, and takes the answer for a constant.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def first_derivative_only(op: str, gradients: Callable[..., Any]) -> Callable[..., Any]:
    """`gradients(ctx, *upstream)` of a Triton operator, refusing where the result is itself to be differentiated.

    Not left to autograd: it refuses only where an input of the backward operator requires a gradient, and takes what
    the forward pass has saved for a constant.
    """

    def once(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled():  # in a backward pass: create_graph=True
            raise NotImplementedError(
                f"{op}: the Triton implementation has no second derivative; use "
                'implementation="reference" where create_graph=True is needed'
            )
        return gradients(ctx, *upstream)

    return once


def explain(op: str, device: torch.device | str, implementation: str | None = None, unfit: Unfit = ()) -> Selection:
    """What would run for `op` on `device`, and the reasons against the implementations that would not.

    Raises:
        ValueError: the request names no known implementation.
    """
    device, requested = torch.device(_assumed.get() or device), _request(implementation)
    candidates, of_this_call = _registry[op], dict(unfit)
    if transformed():
        of_this_call |= {name: TRANSFORMED for name in candidates if name != REFERENCE}
    if requested != AUTO:
        check = candidates.get(requested)
        reason = (check(device) or of_this_call.get(requested)) if check else f"{op} has no such implementation"
        return Selection(
            op, device.type, requested, None if reason else requested, {requested: reason} if reason else {}
        )
    rejected: dict[str, str] = {}
    for name, check in candidates.items():
        reason = check(device) or of_this_call.get(name)
        if reason is None and name == "triton" and device.type == "cpu":
            reason = "Triton's interpreter runs only when it is requested"
        if reason is None:
            return Selection(op, device.type, requested, name, rejected)
        rejected[name] = reason
    raise AssertionError(f"the reference of {op} refused {device}")


def select(op: str, device_type: str, implementation: str | None = None, unfit: Unfit = ()) -> str:
    """The name of the implementation to run for `op` on a device type such as "cpu" or "cuda".

    Args:
        op: a registered operator.
        device_type: of the tensors.
        implementation: the request, or None to follow the context and the environment.
        unfit: reasons of this call against implementations, as (implementation, reason) pairs.

    Raises:
        ValueError: the request is unknown, or cannot be met; the message lists the reasons and what would
            run.
    """
    # Asked here, where torch.compile sees it and traces anew when it changes. Of torch.func it knows by itself.
    return _select(op, device_type, implementation, unfit, forward_ad._current_level >= 0)


@torch.compiler.assume_constant_result
def _select(op: str, device_type: str, implementation: str | None, unfit: Unfit, forward_mode: bool) -> str:
    device_type, requested = _assumed.get() or device_type, _request(implementation)
    key = (op, device_type, requested, unfit, forward_mode or torch._C._are_functorch_transforms_active())
    name = _selected.get(key)
    if name is None:
        found = explain(op, device_type, requested, unfit)
        if found.name is None:
            raise ValueError(
                f"{op}: implementation {requested!r} was requested for a tensor on {device_type!r} and "
                f"cannot run: {found.rejected[requested]}. Of {', '.join(_registry[op])}, 'auto' would take "
                f"{explain(op, device_type, AUTO, unfit).name!r} here."
            )
        name = found.name
        if device_type != "meta":  # whether Triton takes meta tensors depends on whether launches are recorded
            _selected[key] = name
    return name
