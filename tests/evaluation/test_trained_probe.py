"""The minibatch probe: parity with logistic regression, chance level, the choice of the rate, latents of large sets."""

import pytest
import torch
from helpers import write_pictures

from aligntok.errors import UserError
from aligntok.evaluation import trained_probe
from aligntok.evaluation.probe import fit_logistic
from aligntok.evaluation.probes import Alignment, trained_probes
from aligntok.evaluation.trained_probe import LatentTable, train_probe
from aligntok.runtime.devices import choose_precision
from aligntok.training.monitoring.telemetry import Telemetry


def clusters(n: int, d: int, classes: int, separation: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99)) * separation
    scales = torch.rand(d, generator=torch.Generator().manual_seed(98)) * 5 + 0.1
    return (torch.randn(n, d, generator=generator) + centres[labels]) * scales, labels


def test_is_as_good_as_logistic_regression_on_the_full_batch():
    (x, y), (other, truth) = clusters(2000, 12, 6, 0.6), clusters(1500, 12, 6, 0.6, seed=1)
    found = train_probe((x, y), (other, truth), epochs=30, batch_size=128)
    mean, std = x.mean(0), x.std(0)
    weight, bias = fit_logistic(((x - mean) / std).double(), y, 6)
    predicted = (((other - mean) / std).double() @ weight.T + bias).argmax(1)
    logistic = (predicted == truth).double().mean().item()
    assert 0.4 < logistic < 0.95
    assert found.accuracy == pytest.approx(logistic, abs=0.025)  # two standard errors of 1,500 answers
    assert found.rate in trained_probe.RATES
    for part in ("12 features", "n=2000", "n=1500", "6 classes", "30 epochs at batch 128", "seed 0"):
        assert part in found.protocol


def test_noise_is_chance_and_runs_repeat():
    x, y = clusters(600, 8, 4, 0.0)
    other = clusters(400, 8, 4, 0.0, seed=1)
    first = train_probe((x, y), other, epochs=10, seed=3)
    assert first.accuracy == pytest.approx(0.25, abs=0.08)
    state = torch.get_rng_state()
    assert first == train_probe((x, y), other, epochs=10, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_a_rate_that_diverges_is_not_chosen(monkeypatch):
    monkeypatch.setattr(trained_probe, "RATES", (0.1, 1e30))
    train, val = clusters(400, 6, 3, 3.0), clusters(200, 6, 3, 3.0, seed=1)
    found = train_probe(train, val, epochs=5)
    assert found.rate == 0.1 and found.accuracy > 0.95


def test_latents_of_a_large_set(tmp_path, monkeypatch):
    monkeypatch.setattr(trained_probe.tempfile, "tempdir", str(tmp_path))
    latents = torch.randn(10, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 2
    with LatentTable(12) as table:  # two of the images could not be read
        for rows in torch.arange(10).split(4):
            table.add(latents[rows], labels[rows])
        assert torch.equal(table.labels, labels)
        torch.testing.assert_close(table.pooled, latents.mean((2, 3)))
        torch.testing.assert_close(table.whole.float(), latents.flatten(1), atol=2e-3, rtol=1e-3)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path.stat().st_size for path in files] == [12 * 12 * 2]
    assert not list(tmp_path.iterdir())


def test_refusals(monkeypatch):
    x, y = clusters(100, 4, 2, 1.0)
    for train, val, message in (
        ((x, y.float()), (x, y), "integer labels"),
        ((x, y), (x[:, :3], y), "do not fit"),
        ((x, y), (x, y + 1), "do not fit"),
        ((x, y * 0), (x, y * 0), "two classes"),
        ((x[:10], y[:10]), (x, y), "20 training images, got 2 and 10: give --train"),
    ):
        with pytest.raises(UserError, match=message):
            train_probe(train, val)
    for options, message in (
        ({"epochs": 0}, "--epochs is 0, expected at least 1"),
        ({"epochs": -1}, "--epochs is -1"),
        ({"batch_size": 1}, "--batch_size is 1, expected at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            train_probe((x, y), (x, y), **options)
    monkeypatch.setattr(trained_probe, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with LatentTable(1000) as table, pytest.raises(UserError, match="TMPDIR"):
        table.add(torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(("classes", "count"), [(("disc",), 24), (("disc", "square"), 10)])
def test_a_set_that_cannot_be_probed_is_refused_before_it_is_encoded(classes, count, tmp_path):
    folder, precision = str(write_pictures(tmp_path / "p", count, classes)), choose_precision("cpu", "fp32")
    alignment = Alignment(None, None, "random", 0, 10, precision)
    with pytest.raises(UserError, match=f"20 training images, got {len(classes)} and {count}"):
        trained_probes(None, (folder, folder), 32, (1, 2, 0), alignment, precision, Telemetry(tmp_path, log_every=1))


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_latents_that_float16_cannot_hold_are_refused(value):
    with LatentTable(2) as table, pytest.raises(UserError, match="not finite, or too large for float16"):
        table.add(torch.full((2, 4, 2, 2), value), torch.zeros(2, dtype=torch.long))
