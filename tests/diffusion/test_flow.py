"""Flow matching: direction, times, the training loss as a whole. The operators are tested in tests/kernels."""

import pytest
import torch
from torch import nn

from aligntok.config import FlowConfig
from aligntok.diffusion.condition import dropped
from aligntok.diffusion.flow import sample_time, training_loss
from aligntok.errors import UserError
from aligntok.kernels import use_implementation


def test_time_sampling():
    torch.manual_seed(0)
    t = sample_time(20_000, "logit_normal")
    assert 0 < t.min() and t.max() < 1
    assert torch.logit(t).mean().abs() < 0.03 and abs(torch.logit(t).std() - 1) < 0.03
    assert abs(sample_time(20_000, "uniform").std() - 12**-0.5) < 0.01
    with pytest.raises(UserError, match="logit_normal or uniform"):
        sample_time(2, "cosine")


def test_dropped_labels_become_the_null_class():
    torch.manual_seed(0)
    (labels,) = dropped((torch.full((10_000,), 3),), (torch.tensor([12]),), 0.1)
    assert set(labels.tolist()) == {3, 12}
    assert abs((labels == 12).float().mean() - 0.1) < 0.01


class Exact(nn.Module):
    """The optimal velocity for data that is one point: (z - x) / t."""

    def __init__(self, point):
        super().__init__()
        self.point = point

    def forward(self, z, t, labels):
        return (z - self.point) / t.view(-1, 1, 1, 1)


def test_the_optimal_velocity_of_a_single_point_has_no_loss():
    point = torch.randn(1, 4, 2, 2)
    data = point.expand(64, -1, -1, -1)
    loss, _ = training_loss(Exact(point), data, (torch.zeros(64, dtype=torch.long),), FlowConfig())
    assert loss.item() == pytest.approx(0, abs=1e-5)


class Recorder(nn.Module):
    """Returns a constant velocity and keeps what it was given."""

    def forward(self, z, t, labels):
        self.z, self.t = z, t
        return torch.zeros_like(z)


def test_time_one_is_noise():
    torch.manual_seed(0)
    model, data = Recorder(), torch.full((256, 4, 4, 4), 100.0)
    loss, values = training_loss(model, data, (torch.zeros(256, dtype=torch.long),), FlowConfig())
    remaining = model.z.mean(dim=(1, 2, 3)) / 100  # 1 - t, up to noise of mean 0
    assert (remaining - (1 - model.t)).abs().max() < 0.01
    # The target z_1 - z_0 has mean square 100^2 + 1, and nothing is parallel to a velocity of zero.
    assert values["mse"].item() == pytest.approx(1e4 + 1, rel=1e-2)
    assert loss.item() == pytest.approx(values["mse"].item() + 1.0, rel=1e-6)


def test_seeded_and_fresh():
    model, data = Recorder(), torch.randn(4, 4, 2, 2)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        training_loss(model, data, (torch.zeros(4, dtype=torch.long),), FlowConfig())
        seen.append(model.z)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_the_model_sees_the_dtype_of_autocast():
    model, data = Recorder(), torch.randn(4, 4, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = training_loss(model, data, (torch.zeros(4, dtype=torch.long),), FlowConfig())
    assert model.z.dtype == torch.bfloat16 and loss.dtype == torch.float32


class Conditioned(nn.Module):
    """A network that looks at z alone."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z, t, labels):
        return self.network(z)


def test_the_fused_operators_train_the_same():
    data, found = torch.randn(2, 4, 2, 2), []
    for implementation in ("triton", "reference"):
        torch.manual_seed(0)
        model = nn.Conv2d(4, 4, 1)
        with use_implementation(implementation):
            loss, values = training_loss(Conditioned(model), data, (torch.zeros(2),), FlowConfig())
        loss.backward()
        found.append((loss.detach(), values, model.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
