"""Samplers: order of convergence, number of evaluations, guidance."""

import pytest
import torch

from aligntok.config import SamplerConfig
from aligntok.diffusion.condition import Condition
from aligntok.diffusion.sampler import integrate, time_grid
from aligntok.errors import UserError
from aligntok.kernels import use_implementation

NULL = 10


class Field:
    """dz/dt = a(label) z, solved by z(0) = z(1) exp(-a); counts how many rows it is asked for."""

    def __init__(self):
        self.rows, self.calls = 0, 0

    def __call__(self, z, t, labels):
        self.rows, self.calls = self.rows + len(z), self.calls + 1
        rate = torch.where(labels == NULL, 0.5, 1.0 + labels)
        return rate.view(-1, 1, 1, 1) * z


def run(**options):
    field = Field()
    config = SamplerConfig(**{"time_shift": 1.0, "guidance_interval": (0.0, 1.0)} | options)
    z = integrate(field, torch.ones(2, 4, 1, 1), Condition.of_labels(torch.tensor([0, 1]), NULL), config)
    return z, field


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    exact = torch.tensor([-1.0, -2.0]).exp()
    errors = [(run(solver=solver, steps=n)[0][:, 0, 0, 0] - exact).abs().max().item() for n in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_steps_are_evaluations(solver):
    assert run(solver=solver, steps=12)[1].calls == 12


def test_guidance_doubles_the_rows_only_inside_its_interval():
    assert run(steps=10)[1].rows == 20
    assert run(steps=10, guidance=3.0)[1].rows == 40
    # Times 1, .9, ... .1; inside [0, .55]: .5, .4, .3, .2, .1
    assert run(steps=10, guidance=3.0, guidance_interval=(0.0, 0.55))[1].rows == 30


def test_guidance_extrapolates_from_the_null_class():
    z, _ = run(steps=1, guidance=3.0)
    # One Euler step: z - v, v = null + 3 (label - null) = .5 + 3 (.5 and 1.5)
    torch.testing.assert_close(z[:, 0, 0, 0], torch.tensor([1 - 2.0, 1 - 5.0]))


def test_guidance_on_the_first_channels_leaves_the_others():
    z, _ = run(steps=1, guidance=3.0, guidance_channels=3)
    torch.testing.assert_close(z[0, :, 0, 0], torch.tensor([-1.0, -1.0, -1.0, 0.0]))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_noise_given_is_not_overwritten(solver):
    noise = torch.ones(2, 4, 1, 1)
    config = SamplerConfig(solver=solver, steps=2)
    z = integrate(Field(), noise, Condition.of_labels(torch.tensor([0, 1]), NULL), config)
    assert torch.equal(noise, torch.ones(2, 4, 1, 1)) and not torch.equal(z, noise)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_fused_step_samples_the_same(solver):
    options = {"solver": solver, "steps": 4, "guidance": 3.0, "guidance_channels": 3, "guidance_interval": (0.0, 0.6)}
    with use_implementation("triton"):
        found = run(**options)[0]
    torch.testing.assert_close(found, run(**options)[0])


def test_time_grid_and_shift():
    grid = time_grid(4, 1.0)
    assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = time_grid(4, 1 / 0.3)
    u = 1 - grid  # LightningDiT's time, shifted there by s = .3
    torch.testing.assert_close(1 - shifted, 0.3 * u / (1 + (0.3 - 1) * u))


def test_a_grid_may_end_before_the_data():
    """RAE's, whose 16 x 16 latents of 768 channels end at t = .0069 and those of 32 x 32 at .0137."""
    assert time_grid(4, 1.0, 0.2).tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    for side, end in ((16, 0.0069), (32, 0.0137)):
        shift = (768 * side * side / 4096) ** 0.5
        assert time_grid(49, shift, 0.001)[-1].item() == pytest.approx(end, abs=5e-5)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([11, 0], {}, "label 11 is out of range"),
        ([-1, 0], {}, "label -1 is out of range"),
        ([0, 0], {"solver": "rk4"}, "expected euler or heun"),
        ([0, 0], {"end": 1.0}, "sampler.end is 1, expected at least 0"),
        ([0, 0], {"solver": "heun", "steps": 5}, "even number"),
        ([0, 0], {"steps": 0}, "at least 1"),
        ([0, 0], {"guidance_channels": 5}, r"expected 1\.\.4"),
        ([0, 0], {"guidance": -3.0}, "guidance is -3, expected a finite scale"),
        ([0, 0], {"guidance": float("inf")}, "guidance is inf"),
        ([0, 0], {"guidance": float("nan")}, "guidance is nan"),
        ([0, 0], {"guidance_interval": (0.9, 0.1)}, r"\[0.9, 0.1\], expected \[from, to\]"),
        ([0, 0], {"guidance_interval": (0.0, 1.5)}, "from <= to <= 1"),
    ],
)
def test_refusals(labels, options, message):
    with pytest.raises(UserError, match=message):
        integrate(
            Field(), torch.ones(2, 4, 1, 1), Condition.of_labels(torch.tensor(labels), NULL), SamplerConfig(**options)
        )
