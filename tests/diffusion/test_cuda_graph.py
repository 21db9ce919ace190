"""Recorded calls: fixed places for inputs and output, one recording per shape, only on CUDA.

Without a device the recording itself is replaced by one that runs the network again at each replay.
"""

import gc

import pytest
import torch
from torch.autograd import forward_ad

from aligntok.config import SamplerConfig
from aligntok.diffusion import cuda_graph, sampler
from aligntok.diffusion.condition import Condition
from aligntok.diffusion.cuda_graph import GraphedCalls, Recording, graphed
from aligntok.kernels import use_implementation


class Imitated(GraphedCalls):
    """Replays by running the network on the recorded places, as a graph's kernels do."""

    def record(self, inputs):
        output = torch.empty_like(self.network(*inputs))
        return Recording(inputs, output, lambda: output.copy_(self.network(*inputs)))


def network(z, t, labels):
    return z * t.view(-1, 1, 1, 1) + labels.view(-1, 1, 1, 1)


def test_one_recording_per_shape_and_new_values_in_the_old_places():
    calls = Imitated(network)
    for rows in (2, 4, 2, 4):
        inputs = torch.randn(rows, 3, 2, 2), torch.rand(rows), torch.arange(rows)
        kept = [x.clone() for x in inputs]
        found = calls(*inputs)
        assert torch.equal(found, network(*inputs))
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "inputs are left as they were"
    assert len(calls.recordings) == 2
    (recording, _) = calls.recordings.values()
    assert calls(*inputs).data_ptr() != recording.output.data_ptr()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_replayed_calls_sample_what_plain_ones_do(solver):
    """With guidance on and off along the way, which are two shapes."""
    noise, labels = torch.randn(2, 4, 2, 2), torch.tensor([0, 1])
    config = SamplerConfig(solver=solver, steps=8, guidance=2.0, guidance_interval=(0.2, 0.6))
    calls = Imitated(network)
    found = sampler.integrate(calls, noise, Condition.of_labels(labels, 3), config)
    assert torch.equal(found, sampler.integrate(network, noise, Condition.of_labels(labels, 3), config))
    assert len(calls.recordings) == 2


def test_derivatives_go_around_recordings():
    """A replay would give the right velocity without its tangent."""
    z, t, labels = torch.randn(2, 3, 2, 2), torch.rand(2), torch.arange(2)
    calls = Imitated(network)
    calls(z, t, labels)
    torch.testing.assert_close(torch.func.jvp(lambda z: calls(z, t, labels), (z,), (z,))[1], z * t.view(-1, 1, 1, 1))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(calls(forward_ad.make_dual(z, z), t, labels)).tangent
    torch.testing.assert_close(tangent, z * t.view(-1, 1, 1, 1))


def test_a_cpu_runs_plain_calls(monkeypatch):
    monkeypatch.setattr(sampler, "graphed", lambda model: pytest.fail("recorded on a CPU"))
    noise, labels = torch.randn(2, 4, 2, 2), torch.tensor([0, 1])
    sampler.integrate(network, noise, Condition.of_labels(labels, 3), SamplerConfig(steps=2, cuda_graph=True))


def test_recordings_are_kept_while_the_weights_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(GraphedCalls, "record", Imitated.record)
    model = torch.nn.Conv2d(4, 4, 1)
    x = torch.randn(2, 4, 2, 2)
    calls = graphed(model)
    with torch.no_grad():
        calls(x)
        model.weight.mul_(2)
        assert graphed(model) is calls and torch.equal(calls(x), model(x)), "new values in the old places"
        with torch.autocast("cpu", torch.bfloat16):
            assert calls(x).dtype == torch.bfloat16, "autocast is another recording"
        assert len(calls.recordings) == 2
        with use_implementation("reference"):
            assert graphed(model) is not calls, "other kernels would run"
        calls = graphed(model)
        model.weight = torch.nn.Parameter(torch.ones(4, 4, 1, 1))
        assert graphed(model) is not calls and torch.equal(graphed(model)(x), model(x))
    assert graphed(network) is not graphed(network), "of a function nothing is known"


def test_recordings_end_with_their_network(monkeypatch):
    monkeypatch.setattr(GraphedCalls, "record", Imitated.record)
    model, before = torch.nn.Conv2d(4, 4, 1), len(cuda_graph._kept)
    with torch.no_grad():
        graphed(model)(torch.randn(2, 4, 2, 2))
    assert len(cuda_graph._kept) == before + 1
    del model
    gc.collect()
    assert len(cuda_graph._kept) == before


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_graphs_sample_what_launches_do(cuda_graph):
    torch.manual_seed(0)
    model = torch.nn.Conv2d(4, 4, 3, padding=1).cuda()
    noise, labels = torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([0, 1], device="cuda")
    config = SamplerConfig(steps=6, guidance=2.0, guidance_interval=(0.2, 0.6), cuda_graph=cuda_graph)

    def velocity(z, t, labels):
        return model(z) * t.view(-1, 1, 1, 1) + labels.view(-1, 1, 1, 1)

    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = sampler.integrate(velocity, noise, Condition.of_labels(labels, 3), config)
        config.cuda_graph = False
        expected = sampler.integrate(velocity, noise, Condition.of_labels(labels, 3), config)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
