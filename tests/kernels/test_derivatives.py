"""Forward mode, vmap and second derivatives of every operator, in every implementation: right, or refused by name.

What is right is told by loops, central differences and first derivatives of the PyTorch reference in fp64, none of
which needs a transform. A compiled implementation has no rule for a transform: asked for by name it refuses and says
what to ask for instead, and `auto` runs the reference.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from kernel_checks import DEVICE, normal, relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

from aligntok import kernels
from aligntok.kernels import _dispatch

STEP = 1e-5  # of central differences in fp64
TOLERANCE = 2e-4  # fp32 against fp64; a second derivative is a small difference of large terms
NAMED = 'implementation="reference"'  # what a refusal says


@dataclass(frozen=True)
class Case:
    """An operator with some arguments: call(implementation, *tensors) gives all results that are looked at, flat."""

    function: str  # in aligntok.kernels
    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]  # of the tensors
    op: str | None = None  # in the registry, where it is called otherwise
    linear: bool = False  # the compiled implementations know that the second derivative is zero
    constant: bool = False  # the results carry no derivative

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(normal(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(self.shapes))

    def scalar(self, implementation: str) -> Callable[..., Tensor]:
        """The results weighted by fixed numbers and added up."""

        def weighted(*tensors: Tensor) -> Tensor:
            y = self.call(implementation, *tensors)
            return (y * _constant(*y.shape).to(y.dtype)).sum()

        return weighted


def _constant(*shape: int) -> Tensor:
    """Numbers in [-1, 1] that are not drawn: vmap asks about everything that is."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float32, device=DEVICE).mul(1.7).sin().view(shape)


def _key() -> Tensor:
    return torch.tensor([3, 5], device=DEVICE)


def _flat(*outputs: Tensor) -> Tensor:
    return torch.cat([y.flatten() for y in outputs])


def _adaln(implementation, x, scale, shift, h, gate, weight):
    return _flat(*kernels.adaln(x, scale, shift, h, gate, weight, implementation=implementation))


def _adaln_norm(implementation, x, scale):
    return _flat(kernels.adaln(x, scale, implementation=implementation)[1])


def _adapter(implementation, p, weight, bias):
    return _flat(kernels.adapter_projection(p, weight, bias, implementation=implementation))


def _adapter_distance(implementation, p, weight, bias):
    snapshot = _constant(*p.shape[:-1], len(bias))
    return _flat(*kernels.adapter_projection(p, weight, bias, "gelu", snapshot, implementation=implementation))


def _interpolate(implementation, data, t):
    return _flat(kernels.flow_interpolate(data, t, _key(), implementation=implementation))


def _flow_loss(implementation, velocity, data):
    return kernels.flow_loss(velocity, data, _key(), 0.5, implementation=implementation)[0][None]


def _flow_loss_velocity(implementation, velocity):
    return _flow_loss(implementation, velocity, _constant(*velocity.shape))


def _step(implementation, z, velocity):
    z, ahead = z.clone(), torch.empty_like(z)
    kernels.flow_step(z, velocity, -0.3, guidance=1.5, channels=3, ahead=ahead, implementation=implementation)
    return _flat(z, ahead)


def _discriminator(kind, lecam_weight):
    def call(implementation, real, fake):
        lecam = {"lecam_means": torch.tensor([0.1, -0.2], device=DEVICE), "lecam_weight": lecam_weight}
        return kernels.discriminator_loss(real, fake, kind, **lecam, implementation=implementation)[0][None]

    return call


def _generator(kind):
    return lambda implementation, fake: kernels.generator_loss(fake, kind, implementation=implementation)[0][None]


def _statistics(implementation, real, fake):
    stats = kernels.discriminator_loss(real, fake, implementation=implementation)[1]
    return _flat(stats, kernels.generator_loss(fake, implementation=implementation)[1])


def _group_norm(activation):
    return lambda implementation, x, weight, bias: _flat(
        kernels.group_norm_silu(x, weight, bias, 2, 1e-6, activation, implementation=implementation)
    )


def _lpips(implementation, fx, fy, head):
    return kernels.lpips_distance(fx, fy, head, implementation=implementation)


def _lpips_maps(implementation, fx, fy):
    return _lpips(implementation, fx, fy, _constant(fx.shape[1]).abs())


def _ratio(implementation, a, b):
    return kernels.norm_ratio([a, 2 * a], [b], delta=0.1, implementation=implementation)[None]


def _tables() -> tuple[Tensor, Tensor]:
    angles = _constant(5, 16).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _attention(implementation, qkv, q_weight, k_weight):
    return _flat(kernels.qknorm_attention(qkv, q_weight, k_weight, *_tables(), implementation=implementation))


def _joint(implementation, text, image, *weights):
    tables, lengths = [table[:, ::2] for table in _tables()], torch.tensor([1, 0], device=DEVICE)[: len(text)]
    options = {"text_tokens": 2, "lengths": lengths, "implementation": implementation}
    return _flat(*kernels.joint_attention((text, image), weights[:2], weights[2:], *tables, **options))


def _rope(implementation, qkv, q_weight, k_weight):
    return _flat(*kernels.qknorm_rope(qkv, q_weight, k_weight, *_tables(), implementation=implementation))


def _turn(implementation, qkv, cos, sin):
    return _flat(*kernels.qknorm_rope(qkv, None, None, cos, sin, implementation=implementation))


def _swiglu(implementation, packed):
    return _flat(kernels.swiglu(packed, implementation=implementation))


_IMAGE, _QKV, _MAPS, _LOGITS = (2, 4, 2, 3), (2, 5, 3, 2, 32), (2, 6, 2, 3), (2, 1, 3, 3)
_P, _ROWS, _VECTOR = ((2, 5, 8), (4, 8), (4,)), (2, 3, 8), (2, 8)
CASES = {
    "adaln": Case("adaln", _adaln, (_ROWS, _VECTOR, _VECTOR, _ROWS, _VECTOR, (8,))),
    "adaln: norm only": Case("adaln", _adaln_norm, (_ROWS, _VECTOR)),
    "adapter_projection": Case("adapter_projection", _adapter, _P),
    "adapter_projection: distance": Case("adapter_projection", _adapter_distance, _P),
    "flow_interpolate": Case("flow_interpolate", _interpolate, (_IMAGE, (2,))),
    "flow_loss": Case("flow_loss", _flow_loss, (_IMAGE, _IMAGE)),
    "flow_loss: velocity": Case("flow_loss", _flow_loss_velocity, (_IMAGE,)),
    "flow_step": Case("flow_step", _step, (_IMAGE, (4, *_IMAGE[1:]))),
    "discriminator_loss: hinge": Case(
        "discriminator_loss", _discriminator("hinge", 0), (_LOGITS, _LOGITS), op="gan_loss", linear=True
    ),
    "discriminator_loss: softplus": Case(
        "discriminator_loss", _discriminator("non_saturating", 0), (_LOGITS, _LOGITS), op="gan_loss"
    ),
    "discriminator_loss: LeCam": Case(
        "discriminator_loss", _discriminator("hinge", 0.1), (_LOGITS, _LOGITS), op="gan_loss"
    ),
    "generator_loss: hinge": Case("generator_loss", _generator("hinge"), (_LOGITS,), op="gan_loss", linear=True),
    "generator_loss: softplus": Case("generator_loss", _generator("non_saturating"), (_LOGITS,), op="gan_loss"),
    "statistics of logits": Case(
        "discriminator_loss", _statistics, (_LOGITS, _LOGITS), op="gan_loss", linear=True, constant=True
    ),
    "group_norm_silu": Case("group_norm_silu", _group_norm(True), (_IMAGE, (4,), (4,))),
    "group_norm_silu: norm only": Case("group_norm_silu", _group_norm(False), (_IMAGE, (4,), (4,))),
    "joint_attention": Case("joint_attention", _joint, ((2, 2, 3, 2, 32), (2, 3, 3, 2, 32), *[(32,)] * 4)),
    "lpips_distance": Case("lpips_distance", _lpips, (_MAPS, _MAPS, (6,))),
    "lpips_distance: maps": Case("lpips_distance", _lpips_maps, (_MAPS, _MAPS)),
    "norm_ratio": Case("norm_ratio", _ratio, ((3, 4), (5,)), linear=True, constant=True),
    "qknorm_attention": Case("qknorm_attention", _attention, (_QKV, (32,), (32,))),
    "qknorm_rope": Case("qknorm_rope", _rope, (_QKV, (32,), (32,))),
    "qknorm_rope: tables": Case("qknorm_rope", _turn, (_QKV, (5, 32), (5, 32))),
    "swiglu": Case("swiglu", _swiglu, ((3, 10),)),
}


def _implementations(case: Case) -> list[str]:
    """What can be asked for here: "auto", the reference and those that run on this machine."""
    op = case.op or case.function
    found = [name for name in _dispatch._registry[op] if kernels.explain(op, DEVICE, name).name]
    return ["auto", *found]


ALL = [
    pytest.param(case, name, id=f"{title} {name}") for title, case in CASES.items() for name in _implementations(case)
]


def _wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


def _moved(tensors: tuple[Tensor, ...], direction: tuple[Tensor, ...], step: float) -> tuple[Tensor, ...]:
    return tuple(x + step * v for x, v in zip(_wide(tensors), _wide(direction), strict=True))


def _central(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Tensor:
    above, below = (function(*_moved(tensors, direction, step)) for step in (STEP, -STEP))
    return (above - below) / (2 * STEP)


def _first(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """The reference's gradient of the case's scalar in fp64 by ordinary autograd, flat; zeros where there is none."""
    leaves = [x.double().requires_grad_() for x in tensors]
    total = case.scalar("reference")(*leaves)
    if not total.requires_grad:
        return _flat(*map(torch.zeros_like, leaves))
    return _flat(*torch.autograd.grad(total, leaves, materialize_grads=True))


def _forward_truth(case: Case, tensors: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Tensor:
    found = _central(lambda *x: case.call("reference", *x), tensors, direction)
    return torch.zeros_like(found) if case.constant else found


def _second_truth(case: Case, tensors: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Tensor:
    return _central(lambda *x: _first(case, x), tensors, direction)


def _by_jvp(case: Case, name: str) -> tuple[Tensor, Tensor]:
    x, v = case.tensors(), case.tensors(50)
    return jvp(lambda *x: case.call(name, *x), x, v)[1], _forward_truth(case, x, v)


def _by_dual_numbers(case: Case, name: str) -> tuple[Tensor, Tensor]:
    x, v = case.tensors(), case.tensors(50)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(case.call(name, *map(forward_ad.make_dual, x, v)))
        return torch.zeros_like(y) if tangent is None else tangent, _forward_truth(case, x, v)


def _by_jacfwd(case: Case, name: str) -> tuple[Tensor, Tensor]:
    """A scalar's whole gradient, forward: vmap of jvp."""
    x = case.tensors()
    found = jacfwd(case.scalar(name), tuple(range(len(x))))(*x)
    return _flat(*found), torch.zeros_like(_first(case, x)) if case.constant else _first(case, x)


def _batch(case: Case) -> tuple[Tensor, ...]:
    return tuple(map(torch.stack, zip(case.tensors(), case.tensors(30), strict=True)))


def _by_vmap(case: Case, name: str) -> tuple[Tensor, Tensor]:
    batch = _batch(case)
    one_by_one = [case.call("reference", *_wide(x)) for x in zip(*batch, strict=True)]
    return vmap(lambda *x: case.call(name, *x))(*batch), torch.stack(one_by_one)


def _by_grad(case: Case, name: str) -> tuple[Tensor, Tensor]:
    x = case.tensors()
    return _flat(*grad(case.scalar(name), tuple(range(len(x))))(*x)), _first(case, x)


def _by_jvp_of_grad(case: Case, name: str) -> tuple[Tensor, Tensor]:
    x, v = case.tensors(), case.tensors(50)
    found = jvp(grad(case.scalar(name), tuple(range(len(x)))), x, v)[1]
    return _flat(*found), _second_truth(case, x, v)


def _by_vmap_of_grad(case: Case, name: str) -> tuple[Tensor, Tensor]:
    """Gradients of each of a batch."""
    batch = _batch(case)
    found = vmap(grad(case.scalar(name), tuple(range(len(batch)))))(*batch)
    return torch.cat([g.flatten(1) for g in found], 1), torch.stack([_first(case, x) for x in zip(*batch, strict=True)])


TRANSFORMS = {function.__name__.removeprefix("_by_"): function for function in (
    _by_jvp, _by_dual_numbers, _by_jacfwd, _by_vmap, _by_grad, _by_jvp_of_grad, _by_vmap_of_grad
)}  # fmt: skip


def test_every_operator_and_every_public_function_has_a_case():
    assert {case.op or case.function for case in CASES.values()} == set(kernels.operators())
    callables = {name: getattr(kernels, name) for name in kernels.__all__ if callable(getattr(kernels, name))}
    public = {name for name, f in callables.items() if "implementation" in inspect.signature(f).parameters}
    assert {case.function for case in CASES.values()} == public - {"explain", "select"}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("case", "name"), ALL)
def test_a_transform_is_right_or_refused(case, name, transform):
    if name in ("auto", "reference"):
        found, expected = TRANSFORMS[transform](case, name)
        assert relative_error(found, expected) < TOLERANCE
    else:
        with pytest.raises(ValueError, match=NAMED):
            TRANSFORMS[transform](case, name)


@pytest.mark.parametrize(("case", "name"), ALL)
def test_a_second_derivative_is_right_or_refused(case, name):
    """In a sum with a term that has one: a missing part would not be noticed by autograd."""
    x, v = [x.requires_grad_() for x in case.tensors()], case.tensors(50)

    def second() -> Tensor:
        total = case.scalar(name)(*x) + sum(one.square().sum() for one in x)
        gradients = torch.autograd.grad(total, x, create_graph=True)
        return _flat(*torch.autograd.grad(gradients, x, v))

    compiled = name not in ("auto", "reference")
    try:
        found = second()
    except (NotImplementedError, ValueError) as error:
        assert name != "reference" and not case.linear and "reference" in str(error)
    else:
        assert case.linear or not compiled
        expected = _second_truth(case, [one.detach() for one in x], v) + 2 * _flat(*v).double()
        assert relative_error(found, expected) < TOLERANCE


def test_hessian_products_with_auto_say_what_to_do_and_then_work():
    x, v = normal(3, 10, seed=1), normal(3, 10, seed=2)

    def total(x: Tensor) -> Tensor:
        return kernels.swiglu(x).square().sum()

    if kernels.explain("swiglu", DEVICE).name != "reference":
        with pytest.raises(NotImplementedError, match=NAMED):
            torch.autograd.functional.hvp(total, x, v)
    with kernels.use_implementation("reference"):
        found = torch.autograd.functional.hvp(total, x, v)[1]
    assert relative_error(found, jvp(grad(total), (x,), (v,))[1]) < 1e-5


def test_the_choice_inside_a_transform_is_explained_and_ends_with_it():
    before = kernels.explain("swiglu", DEVICE).name
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(kernels.explain("swiglu", DEVICE))
        return kernels.swiglu(x)

    vmap(look)(normal(2, 4, seed=1))
    assert kernels.swiglu(normal(2, 4, seed=1)).shape == (2, 2) and not kernels.transformed()
    assert seen[0].name == "reference" and NAMED in seen[0].rejected["triton"]
    assert _dispatch.select("swiglu", DEVICE) == kernels.explain("swiglu", DEVICE).name == before


def test_a_request_by_context_or_environment_is_refused_inside_a_transform(monkeypatch):
    x = normal(2, 4, seed=1)
    name = next(n for n in ("cpp", "triton") if kernels.explain("swiglu", DEVICE, n).name)
    with kernels.use_implementation(name), pytest.raises(ValueError, match=NAMED):
        vmap(kernels.swiglu)(x)
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(ValueError, match=NAMED):
        jvp(kernels.swiglu, (x,), (x,))


def test_noise_under_vmap_follows_its_randomness():
    data, t = _constant(4, 3, 2, 2), torch.full((3,), 0.7, device=DEVICE)

    def noisy(z: Tensor) -> Tensor:
        return kernels.flow_interpolate(z[None], t[:1], kernels.noise_key(DEVICE))

    equal = data[:1].expand(3, -1, -1, -1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(noisy)(equal)
    same, different = (vmap(noisy, randomness=kind)(equal) for kind in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert (different[0] - different[1]).abs().max() > 0.1
    key = torch.stack([_key(), _key() + 1])
    batched = vmap(lambda key: kernels.flow_interpolate(data, t.mean().expand(4), key))(key)
    for one, k in zip(batched, key, strict=True):
        torch.testing.assert_close(one, kernels.flow_interpolate(data, t.mean().expand(4), k))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_code_keeps_no_choice_across_a_transform(fresh_compiler):
    x, v, ones = normal(2, 4, 3, 2, seed=1), normal(2, 4, 3, 2, seed=2), torch.ones(4, device=DEVICE)

    def function(x: Tensor) -> Tensor:
        return kernels.group_norm_silu(x, ones, ones, 2, 1e-6)

    def by_dual_numbers(f: Callable[[Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent

    expected = jvp(function, (x,), (v,))[1]
    compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    torch.testing.assert_close(by_dual_numbers(compiled), expected)
    torch.testing.assert_close(jvp(compiled, (x,), (v,))[1], expected)
    torch.testing.assert_close(compiled(x), function(x))


def test_a_transform_inside_compiled_code_sees_the_reference(fresh_compiler):
    x, v = normal(3, 10, seed=1), normal(3, 10, seed=2)

    def tangent(x: Tensor, v: Tensor) -> Tensor:
        return jvp(kernels.swiglu, (x,), (v,))[1]

    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, v), tangent(x, v))
