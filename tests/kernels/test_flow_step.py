"""flow_step: Triton against the fp64 reference, guidance, Heun, strides, the operator's contract, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import check_kernel, normal

from aligntok.kernels import explain
from aligntok.kernels._triton import use_configurations
from aligntok.kernels.flow_step import flow_step

SMALL = {"flow_step": {"TILE": 64, "num_warps": 1, "num_stages": 1}}


def stepped(implementation, dt=-0.1, guidance=1.0, channels=None, heun=False):
    """A function of (z, velocity) that returns what the step wrote."""

    def run(z, velocity):
        z = z.clone()
        ahead = torch.empty_like(z) if heun else None
        options = {"guidance": guidance, "channels": channels, "ahead": ahead, "implementation": implementation}
        assert flow_step(z, velocity, dt, **options) is None
        return (z, ahead) if heun else z

    return run


def check(z, velocity, **options):
    check_kernel(stepped("triton", **options), stepped("reference", **options), [z, velocity], tolerance=2e-5)


@settings(max_examples=15)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 20),
    side=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    guided=st.sampled_from([None, "all", "first"]),
    heun=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_fp64(batch, channels, side, dtype, guided, heun, seed):
    z = normal(batch, channels, *side, seed=seed)
    velocity = normal(2 * batch if guided else batch, channels, *side, seed=seed + 1, dtype=dtype)
    first = 1 + seed % channels if guided == "first" else None
    with use_configurations(SMALL):
        check(z, velocity, guidance=3.5 if guided else 1.0, channels=first, heun=heun)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_formula(implementation):
    z, velocity = normal(2, 4, 3, 3, seed=1), normal(4, 4, 3, 3, seed=2)
    labelled, null = velocity.chunk(2)
    guided = null + 3 * (labelled - null)
    found, ahead = stepped(implementation, dt=-0.5, guidance=3.0, heun=True)(z, velocity)
    torch.testing.assert_close(ahead, z - 0.5 * guided)
    torch.testing.assert_close(found, z - 0.25 * guided)
    found = stepped(implementation, dt=-0.5, guidance=3.0, channels=3)(z, velocity)
    torch.testing.assert_close(found, z - 0.5 * torch.cat([guided[:, :3], labelled[:, 3:]], dim=1))
    found = stepped(implementation, dt=-0.5)(z, labelled)
    torch.testing.assert_close(found, z - 0.5 * labelled)


def test_strided_velocity():
    wide = normal(4, 12, 5, 6, seed=3)
    for velocity in (
        wide.contiguous(memory_format=torch.channels_last),
        wide[:, 1:9:3],
        wide.transpose(2, 3),
        wide[:1].expand(4, -1, -1, -1),
        wide[..., :1],
    ):
        z = normal(2, *velocity.shape[1:], seed=4)
        check(z, velocity, guidance=2.0)
        check(z, velocity[::2])


def test_a_state_that_is_not_contiguous_is_for_the_reference():
    z, velocity = normal(2, 4, 3, 5, seed=5), normal(2, 4, 5, 3, seed=6)
    expected = stepped("reference")(z.transpose(2, 3), velocity)
    flow_step(z.transpose(2, 3), velocity, -0.1)
    torch.testing.assert_close(z.transpose(2, 3), expected)
    with pytest.raises(ValueError, match="not contiguous"):
        flow_step(z.transpose(2, 3), velocity, -0.1, implementation="triton")


def test_pinned_configuration():
    velocity = normal(4, 9, 9, 32, seed=7, dtype=torch.float16).permute(0, 3, 1, 2)
    check(normal(2, 32, 9, 9, seed=8), velocity, guidance=4.0, heun=True)


@pytest.mark.parametrize("heun", [False, True])
def test_operator_contract(heun):
    z, velocity = normal(2, 5, 3, 2, seed=9), normal(4, 5, 3, 2, seed=10)
    inputs = (z, velocity, -0.1, 2.0, 3, torch.zeros_like(z) if heun else None)
    torch.library.opcheck(torch.ops.aligntok.flow_step_triton.default, inputs)


def test_compiles_whole():
    z, velocity = normal(2, 5, 3, 2, seed=11), normal(4, 5, 3, 2, seed=12)
    for heun in (False, True):
        run = stepped("triton", guidance=2.0, channels=3, heun=heun)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z, velocity), run(z, velocity))


def test_default_on_a_cuda_device_is_triton():
    assert explain("flow_step", "cuda").name == "triton"
    assert explain("flow_step", "cpu").name == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 3, 4)}, r"z: expected shape \[B, d, h, w\]"),
        ({"z": torch.zeros(2, 3, 4, 4, dtype=torch.float16)}, "float32"),
        ({"velocity": torch.zeros(3, 3, 4, 4)}, "velocity: expected"),
        ({"velocity": torch.zeros(4, 3, 4, 4, dtype=torch.int32)}, "float32"),
        ({"guidance": 2.0}, "needs the null half"),
        ({"channels": 4}, r"expected 1\.\.3"),
        ({"channels": 0}, r"expected 1\.\.3"),
        ({"ahead": torch.zeros(2, 3, 4, 5)}, "like z"),
        ({"ahead": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, "like z"),
        ({"z": torch.zeros(2, 3, 4, 4, dtype=torch.float64), "implementation": "triton"}, "fp64"),
        ({"velocity": torch.zeros(2, 3, 4, 4, requires_grad=True), "implementation": "triton"}, "gradient"),
    ],
)
def test_refusals(change, message):
    given = {"z": torch.zeros(2, 3, 4, 4), "velocity": torch.zeros(2, 3, 4, 4)} | change
    with pytest.raises(ValueError, match=message):
        flow_step(given.pop("z"), given.pop("velocity"), -0.1, **given)
