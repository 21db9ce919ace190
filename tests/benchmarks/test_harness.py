"""The benchmark harness: wrong results get no time, losing cases are named, the samples make the figures."""

import argparse
import csv
import re
from functools import partial

import pytest
import torch

from benchmarks import harness, results
from benchmarks.harness import Case, Provider
from benchmarks.results import Measurement

BASELINE = Provider("eager", lambda x: (x.square().mean(), x.detach().max()))


@pytest.fixture
def case():
    """A case of five numbers."""
    return Case("five", (torch.arange(5.0).requires_grad_(),), 1e-6)


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        (lambda x: (x.square().mean(), x.detach().max()), None),
        (lambda x: (x.square().mean(),), None),
        (lambda x: (x.square().sum() / 5.001, x.detach().max()), "output 0 differs by"),
        (lambda x: (x.square().mean(), x.detach().max(keepdim=True, dim=0)[0]), r"output 1 has shape \(1,\)"),
        (lambda x: (x.square().detach().mean() + x.mean() * 0, x.detach().max()), "gradient 0 differs by"),
        (lambda x: (x.square().mean() * float("nan"),), "output 0 differs by nan"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_results_are_compared_before_anything_is_timed(case, provider, reason):
    found = harness.disagreement(Provider("ours", provider), BASELINE, case)
    assert found is None if reason is None else re.search(reason, found)


def _options(tmp_path, phase="all"):
    files = {"csv": tmp_path / "figures.csv", "plot": tmp_path / "ratios.png"}
    return argparse.Namespace(phase=phase, seconds=0.01, threads=None, smallest=False, **files)


def test_a_wrong_provider_has_no_figures_and_fails_the_run(case, tmp_path, capsys):
    wrong = Provider("ours", lambda x: (x.mean(), x.detach().max()))
    status = harness.compare([([BASELINE, wrong], [case])], "ours", _options(tmp_path))
    printed = capsys.readouterr().out
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    assert status == 1 and "refused: ours at five, both: output 0 differs" in printed
    assert "x**" not in printed and "torch " + torch.__version__ in printed
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert [row["phase"] for row in rows] == ["forward", "forward", "backward", "backward", "both", "both"]
    assert all(bool(row["median_us"]) == (row["provider"] == "eager") for row in rows)


def test_on_a_gpu_fused_and_compiled_columns_are_replayed_too(case, tmp_path, capsys, monkeypatch):
    """Recorded once for each phase; with a recording that runs the work again, as a graph's kernels do."""
    recorded = []
    monkeypatch.setattr(harness, "record", lambda work: (None, recorded.append(work) or work))
    monkeypatch.setattr(harness, "with_replays", partial(_with_replays_on_a_gpu, harness.with_replays, monkeypatch))
    ours = Provider("ours", lambda x: ((x * x).sum() / 5, x.detach().max()))
    assert harness.compare([([BASELINE, ours], [case])], "ours", _options(tmp_path)) == 0
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert [row["phase"] for row in rows if row["provider"] == "ours, replayed"] == ["forward", "both"]
    assert all(row["median_us"] for row in rows) and len(recorded) == 2
    assert "ours, replayed" in capsys.readouterr().out


def test_what_cannot_be_recorded_has_no_figures_and_the_others_keep_theirs(case, monkeypatch):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(harness, "record", refuse)
    providers = [BASELINE, Provider("ours, replayed", BASELINE.run, recorded=True)]
    plain, replayed = harness.measure(case, "both", providers, budget_s=0.0)
    assert plain.samples and not replayed.samples
    assert replayed.refusal == "RuntimeError: operation not permitted when stream is capturing"


def _with_replays_on_a_gpu(with_replays, monkeypatch, providers, phase):
    with monkeypatch.context() as patch:
        patch.setattr(harness, "CUDA", True)
        return with_replays(providers, phase)


def test_right_providers_are_timed_and_no_gradient_is_left_behind(case, tmp_path, capsys):
    ours = Provider("ours", lambda x: ((x * x).sum() / 5, x.detach().max()))
    assert harness.compare([([BASELINE, ours], [case])], "ours", _options(tmp_path, "both")) == 0
    assert capsys.readouterr().out.count("x**") == 1
    assert case.inputs[0].grad is None


def test_table_and_remarks_follow_the_samples():
    eager = Measurement("c", "both", "eager", [3e-6, 1e-6, 2e-6])
    ours = Measurement("c", "both", "ours", [4e-3, 4e-3, 1e-3, 9e-3, 4e-3])
    assert eager.median == 2e-6 and ours.quantile(0.2) == 4e-3 and ours.quantile(0.8) == 9e-3
    assert "| c | both | 2.0 us (1.0 us .. 3.0 us) | 4.00 ms (4.00 ms .. 9.00 ms) **0.00x** |" in results.table(
        [[eager, ours]]
    )
    assert results.remarks([[eager, ours]], "ours") == ["losing: ours at c, both: 0.00x against eager"]
