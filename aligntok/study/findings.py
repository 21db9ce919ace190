"""The paper's findings, each as an order of rows by a metric, and whether it appeared in the study.

Two rows are compared by their differences over the seeds that both have, d_1 ... d_n. The order "held" when their mean
is on the paper's side and t = mean / (sd / sqrt(n)) passes Student's one-sided 5 % point; it is "reversed" when the
same is true on the other side; else the difference is "within the noise". An order of several rows held when all
neighbours did.

How well latents were learned is measured through decoders. AlignTok and AlignTok with Stage 3 have the same latents and
the same generator, so what these measures show between the two is the decoders': a difference that is not larger than
that, in any seed of this control, is noise too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from scipy import stats

from aligntok.study.results import (
    ABOVE,
    ABOVE_KD,
    CKNNA,
    FOUND,
    GFD,
    GUIDED,
    PROBE,
    PSNR,
    RECOGNISED,
    RFD,
    Metric,
    Results,
)
from aligntok.study.rows import NAMES, STAGE_BY_STAGE

LEVEL = 0.05  # one-sided, of each test
HELD, REVERSED, NOISE, MISSING = "held", "reversed", "within the noise", "too few seeds"
CONTROL = ("aligntok", STAGE_BY_STAGE)  # the same latents, the same generator


@dataclass(frozen=True)
class Claim:
    """What the paper reports: rows from best to worst by a metric."""

    text: str
    paper: str  # its numbers on ImageNet 256, from its tables of tokenizers (gFID) and ablations (gFID with guidance)
    metric: Metric
    order: tuple[str, ...]


TOKENIZERS = (
    Claim(
        "a probe reads more the more the latents are tied to the encoder: Stage 1, w_sp 5, 1, 0",
        "41.5 > 40.6 > 35.1 > 9.5 %",
        PROBE,
        ("stage1_only", "w_sp_5", "aligntok", "w_sp_0"),
    ),
    Claim(
        "reconstruction is better the less they are tied: w_sp 0, 1, 5, Stage 1",
        "rFID .33 < .36 < .49 < 1.63",
        RFD,
        ("w_sp_0", "aligntok", "w_sp_5", "stage1_only"),
    ),
    Claim("the same order by PSNR", "17.34 dB for Stage 1", PSNR, ("w_sp_0", "aligntok", "w_sp_5", "stage1_only")),
    Claim(
        "a probe reads most of AlignTok, then VA-VAE with a ViT, with a CNN, VAE",
        "35.1 > 33.6 > 23.0 > 6.0 %",
        PROBE,
        ("aligntok", "va_vae_vit", "va_vae", "vae"),
    ),
    Claim("CKNNA: AlignTok, VA-VAE, VAE", ".282 > .233 > .023", CKNNA, ("aligntok", "va_vae", "vae")),
    Claim("AlignTok with all stages reconstructs better than VA-VAE", ".26 < .28", RFD, ("three_stages", "va_vae")),
    Claim("L_sp after the adapter keeps more for a probe", "35.1 > 15.6 %", PROBE, ("aligntok", "before_adapter")),
    Claim("a cosine in place of L2 keeps more for a probe", "38.0 > 35.1 %", PROBE, ("cosine", "aligntok")),
    Claim("L2 reconstructs better than a cosine", "rFID .36 < .37", RFD, ("aligntok", "cosine")),
    Claim("training the encoder reconstructs better than LoRA", "rFID .36 < 1.35", RFD, ("aligntok", "lora")),
    Claim("a probe reads more of a trained encoder than of LoRA", "35.1 > 18.6 %", PROBE, ("aligntok", "lora")),
    Claim("64 channels reconstruct better than 32", "rFID .17 < .26", RFD, ("aligntok_d64", "aligntok")),
    Claim("a probe reads more of 64 channels than of 32", "47.0 > 35.1 %", PROBE, ("aligntok_d64", "aligntok")),
    Claim("Stage 3, more steps of the decoder, reconstructs better", "rFID .26 < .36", RFD, CONTROL[::-1]),
)
GENERATION = (
    Claim("AlignTok / VA-VAE", "4.05 < 7.79", GFD, ("aligntok", "va_vae")),
    Claim("VA-VAE / VAE", "7.79 < 10.17", GFD, ("va_vae", "vae")),
    Claim("AlignTok / VA-VAE on the same ViT", "4.05 < 8.21", GFD, ("aligntok", "va_vae_vit")),
    Claim("w_sp 1 / 5", "2.19 < 2.48", GUIDED, ("aligntok", "w_sp_5")),
    Claim("w_sp 1 / 0", "2.19 < 3.05", GUIDED, ("aligntok", "w_sp_0")),
    Claim("w_sp 1 / Stage 1 alone", "2.19 < 3.00", GUIDED, ("aligntok", "stage1_only")),
    Claim("L_sp after / before the adapter", "2.19 < 2.83", GUIDED, ("aligntok", "before_adapter")),
    Claim("L2 / cosine", "2.19 < 2.23", GUIDED, ("aligntok", "cosine")),
    Claim("encoder trained / LoRA", "2.19 < 2.97", GUIDED, ("aligntok", "lora")),
    Claim("32 / 64 channels", "4.05 < 5.24", GFD, ("aligntok", "aligntok_d64")),
    Claim("encoder pretrained / random", "no such row", GFD, ("aligntok", "random_encoder")),
)
TEXT = (  # of a 2 B transformer on COCO captions, with guidance (its tables 5, 12 and 14)
    Claim("AlignTok / FLUX's autoencoder", "30.27 < 35.78", GUIDED, ("aligntok", "flux")),
    Claim("AlignTok / FLUX's autoencoder, no guidance", "33.46 < 48.76", GFD, ("aligntok", "flux")),
    Claim("AlignTok / VA-VAE", "31.19 < 34.13", GUIDED, ("aligntok", "va_vae")),
    Claim("AlignTok / VAE", "no such row", GUIDED, ("aligntok", "vae")),
)
# What each claim about generation is asked by, beside the distance to real pictures
LEARNED = (ABOVE, ABOVE_KD, RECOGNISED)
LEARNED_OF_TEXT = (*LEARNED, FOUND)


@dataclass(frozen=True)
class Comparison:
    """Two rows on one metric: `difference` is positive where the first is better, as claimed."""

    better: str
    worse: str
    differences: tuple[float, ...]
    digits: int
    control: float = 0.0  # what the metric shows where there is nothing to show

    @property
    def p(self) -> float | None:
        """Two-sided p of Student's test on the differences; None for fewer than two."""
        return paired_p(self.differences)

    @property
    def verdict(self) -> str:
        if self.p is None:
            return MISSING
        mean = statistics.fmean(self.differences)
        if self.p >= 2 * LEVEL or abs(mean) <= self.control:
            return NOISE
        return HELD if mean > 0 else REVERSED

    @property
    def numbers(self) -> str:
        """Mean difference, seeds that agree, p."""
        if not self.differences:
            return "not measured"
        mean, agree = statistics.fmean(self.differences), sum(d > 0 for d in self.differences)
        p = "" if self.p is None else f", p {self.p:.2g}"
        return f"{mean:+.{self.digits}f}; {agree} of {len(self.differences)} seeds{p}"

    def __str__(self) -> str:
        return f"{NAMES[self.better]} before {NAMES[self.worse]}: {self.verdict} ({self.numbers})"


def paired_p(differences: Iterable[float]) -> float | None:
    """Two-sided p of "the mean is 0"; None for fewer than two differences."""
    values = list(differences)
    if len(values) < 2:
        return None
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    if deviation == 0:
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) * math.sqrt(len(values)) / deviation, len(values) - 1))


def compare(results: Results, claim: Claim, metric: Metric | None = None) -> list[Comparison]:
    """The neighbours of a claim's order, over the seeds that both have, by the claim's metric or another."""
    metric = metric or claim.metric
    neighbours = zip(claim.order, claim.order[1:], strict=False)
    size, digits = control(results, metric), max(1, metric.digits)
    return [Comparison(a, b, differences(results, a, b, metric), digits, size) for a, b in neighbours]


def differences(results: Results, better: str, worse: str, metric: Metric) -> tuple[float, ...]:
    """One for each seed that both rows have, positive where `better` is."""
    sign = 1 if metric.higher_is_better else -1
    seeds = [seed for seed in results.seeds(better) if seed in results.seeds(worse)]
    pairs = [(results.value(better, s, metric), results.value(worse, s, metric)) for s in seeds]
    return tuple(sign * (a - b) for a, b in pairs if a is not None and b is not None)


def control(results: Results, metric: Metric) -> float:
    """The largest difference between the rows of CONTROL; 0 for metrics that they may differ by, and without them."""
    if not metric.above_perfect:
        return 0.0
    return max(map(abs, differences(results, *CONTROL, metric)), default=0.0)


def surviving(comparisons: list[Comparison]) -> list[Comparison]:
    """Those whose two-sided p passes Holm's correction for all of them at 5 %."""
    ranked = sorted((c for c in comparisons if c.p is not None), key=lambda c: c.p or 0.0)
    passed: list[Comparison] = []
    for index, comparison in enumerate(ranked):
        if (comparison.p or 0.0) > LEVEL / (len(ranked) - index):
            break
        passed.append(comparison)
    return passed


def verdict(comparisons: list[Comparison]) -> str:
    """Of a whole order: that of its pairs if they are alike, else in part, mixed, did not hold, or too few seeds."""
    found = {comparison.verdict for comparison in comparisons}
    if len(found) == 1:
        return found.pop()
    if MISSING in found:
        return MISSING
    if REVERSED in found:
        return "mixed" if HELD in found else "did not hold"
    return "in part"


def same_latents(results: Results) -> tuple[int, int]:
    """(seeds for which Stage 3 left the latents as they were, seeds looked at)."""
    seeds = results.seeds(STAGE_BY_STAGE)
    pairs = [[results.fingerprint(STAGE_BY_STAGE, s, stage) for stage in ("stage2", "stage3")] for s in seeds]
    known = [before == after for before, after in pairs if before and after]
    return sum(known), len(known)
