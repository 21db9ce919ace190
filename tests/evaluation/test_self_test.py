"""The self-test passes here, and fails where a metric counts wrongly."""

import pytest
import torch

from aligntok.cli import main
from aligntok.evaluation import self_test
from aligntok.evaluation.adm import precision_recall
from aligntok.evaluation.distances import GaussianStatistics, frechet_distance_of_rows
from aligntok.evaluation.retrieval import Pictures, measure_class_agreement, measure_retrieval
from aligntok.losses.perceptual import PerceptualDistance


def test_every_metric_passes_on_the_command_line(capsys):
    assert main(["evaluate", "self-test"]) == 0
    printed = capsys.readouterr().out
    for metric in (
        "PSNR [dB]",
        "SSIM",
        "LPIPS",
        "Frechet distance",
        "kernel distance",
        "Inception score",
        "precision",
        "recall",
        "CKNNA",
        "linear probe",
        "trained probe",
        "caption retrieval",
        "class agreement",
    ):
        assert metric in printed
    assert "FAIL" not in printed and "of 33 checks passed" in printed


class Squared(PerceptualDistance):
    """Forgets that features have length 1."""

    def forward(self, x, y):
        return sum((a - b).square().mean((1, 2, 3)) for a, b in zip(self.features(x), self.features(y), strict=True))


WRONG = {
    "psnr": ("_reconstruction", lambda a, b: torch.tensor([19.0])),
    "ssim": ("_reconstruction", lambda a, b: torch.tensor([0.9])),
    "frechet_distance": ("_frechet", lambda a, b: 1.0),
    "frechet_distance_of_rows": ("_frechet", lambda x, y: frechet_distance_of_rows(x, y) * 1.01),
    "PerceptualDistance": ("_perceptual", Squared),
    "cknna": ("_alignment", lambda a, b: 0.5),
    "precision_recall": ("_neighbours", lambda a, b: (0.7, 0.7)),
    "measure_retrieval": (
        "_captions",  # against wrong captions
        lambda a, b, c, encode: measure_retrieval(a, b, Pictures(c.features.flip(0), c.captions), encode),
    ),
    "measure_class_agreement": (
        "_captions",  # labels that nobody asked for
        lambda a, b, c: measure_class_agreement(a, b, Pictures(c.features, c.captions, a.labels)),
    ),
}


class Biased(GaussianStatistics):
    """Divides by n."""

    @property
    def cov(self):
        return super().cov * (self.count - 1) / self.count


# One convention changed -> the cases that notice
CONVENTIONS = {
    "GaussianStatistics": (
        "_frechet",
        Biased,
        {"two points each: covariances over n - 1", "of rows: as of their moments"},
    ),
    "precision_recall": (
        "_neighbours",
        lambda a, b: precision_recall(a, b, neighbours=5),
        {"half are reached by k = 5, not by k = 3"},
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_another_convention_is_found(name, monkeypatch):
    group, other, noticed = CONVENTIONS[name]
    monkeypatch.setattr(self_test, name, other)
    assert {check.case for check in getattr(self_test, group)() if not check.passed} == noticed


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_metric_is_found(name, monkeypatch):
    group, wrong = WRONG[name]
    assert all(check.passed for check in getattr(self_test, group)())
    monkeypatch.setattr(self_test, name, wrong)
    assert not all(check.passed for check in getattr(self_test, group)())


def test_a_failure_ends_with_status_1(monkeypatch, capsys):
    failure = self_test.Check("SSIM [x]", "case", 1.0, 0.0, 0.1)
    monkeypatch.setattr("aligntok.commands.evaluate.self_test", lambda update: [failure])
    with pytest.raises(SystemExit) as done:
        main(["evaluate", "self-test"])
    printed = capsys.readouterr().out
    assert done.value.code == 1 and "FAIL" in printed and "0 of 1 checks" in printed and "SSIM [x]" in printed


def test_not_a_number_is_no_pass():
    assert not self_test.Check("metric", "case", 0.0, float("nan"), 1.0).passed
