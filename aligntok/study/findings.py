"""The paper's findings, each as an order of rows by a metric, and whether it appeared in the study.

Two rows are compared by their differences over the seeds that both have, d_1 ... d_n. The order "held" when their mean
is on the paper's side and t = mean / (sd / sqrt(n)) passes Student's one-sided 5 % point; it is "reversed" when the
same is true on the other side; else the difference is "within the noise". An order of several rows held when all
neighbours did.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from aligntok.study.results import ABOVE, CKNNA, GFD, GUIDED, PROBE, PSNR, RFD, Metric, Results
from aligntok.study.rows import NAMES, STAGE_BY_STAGE

# Student's one-sided 5 % points by the number of seeds; more seeds are judged by the last one, which is stricter
CRITICAL = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833, 11: 1.812}
HELD, REVERSED, NOISE, MISSING = "held", "reversed", "within the noise", "too few seeds"


@dataclass(frozen=True)
class Claim:
    """What the paper reports: rows from best to worst by a metric."""

    text: str
    paper: str  # its numbers on ImageNet 256, from its tables of tokenizers (gFID) and ablations (gFID with guidance)
    metric: Metric
    order: tuple[str, ...]


PAPER = (
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
    Claim("w_sp = 1 generates better than w_sp = 5", "2.19 < 2.48", GUIDED, ("aligntok", "w_sp_5")),
    Claim("w_sp = 1 generates better than w_sp = 0", "2.19 < 3.05", GUIDED, ("aligntok", "w_sp_0")),
    Claim("w_sp = 1 generates better than Stage 1 alone", "2.19 < 3.00", GUIDED, ("aligntok", "stage1_only")),
    Claim("AlignTok generates better than VA-VAE", "4.05 < 7.79", GFD, ("aligntok", "va_vae")),
    Claim("VA-VAE generates better than the VAE", "7.79 < 10.17", GFD, ("va_vae", "vae")),
    Claim("AlignTok generates better than VA-VAE on the same ViT", "4.05 < 8.21", GFD, ("aligntok", "va_vae_vit")),
    Claim(
        "a probe reads most of AlignTok, then VA-VAE with a ViT, with a CNN, VAE",
        "35.1 > 33.6 > 23.0 > 6.0 %",
        PROBE,
        ("aligntok", "va_vae_vit", "va_vae", "vae"),
    ),
    Claim("CKNNA: AlignTok, VA-VAE, VAE", ".282 > .233 > .023", CKNNA, ("aligntok", "va_vae", "vae")),
    Claim("L_sp after the adapter generates better than before", "2.19 < 2.83", GUIDED, ("aligntok", "before_adapter")),
    Claim("L_sp after the adapter keeps more for a probe", "35.1 > 15.6 %", PROBE, ("aligntok", "before_adapter")),
    Claim("training the encoder reconstructs better than LoRA", "rFID .36 < 1.35", RFD, ("aligntok", "lora")),
    Claim("a trained encoder generates better than LoRA", "2.19 < 2.97", GUIDED, ("aligntok", "lora")),
    Claim("64 channels reconstruct better than 32", "rFID .17 < .26", RFD, ("aligntok_d64", "aligntok")),
    Claim("a probe reads more of 64 channels than of 32", "47.0 > 35.1 %", PROBE, ("aligntok_d64", "aligntok")),
    Claim("32 channels generate better than 64", "4.05 < 5.24", GFD, ("aligntok", "aligntok_d64")),
    Claim("Stage 3 reconstructs better", "rFID .26 < .36", RFD, ("three_stages", "aligntok")),
    Claim(
        "a pretrained encoder generates better than a random one", "no such row", GFD, ("aligntok", "random_encoder")
    ),
)
# Every claim about generation once more, by how well the generator has learned the latents
CLAIMS = PAPER + tuple(
    replace(
        claim, text=claim.text.replace("generates", "is learned").replace("generate ", "are learned "), metric=ABOVE
    )
    for claim in PAPER
    if claim.metric in (GFD, GUIDED)
)


@dataclass(frozen=True)
class Comparison:
    """Two rows on one metric: `difference` is positive where the first is better, as claimed."""

    better: str
    worse: str
    differences: tuple[float, ...]
    digits: int

    @property
    def verdict(self) -> str:
        n = len(self.differences)
        if n < 2:
            return MISSING
        mean, deviation = statistics.fmean(self.differences), statistics.stdev(self.differences)
        t = math.copysign(math.inf, mean) if deviation == 0 and mean else mean * math.sqrt(n) / (deviation or 1.0)
        if abs(t) < CRITICAL.get(n, min(CRITICAL.values())):
            return NOISE
        return HELD if t > 0 else REVERSED

    def __str__(self) -> str:
        if not self.differences:
            return f"{NAMES[self.better]} / {NAMES[self.worse]}: not measured"
        mean = statistics.fmean(self.differences)
        agree = sum(d > 0 for d in self.differences)
        return (
            f"{NAMES[self.better]} before {NAMES[self.worse]} by {mean:.{self.digits}f} "
            f"({agree} of {len(self.differences)} seeds): {self.verdict}"
        )


def compare(results: Results, claim: Claim) -> list[Comparison]:
    """The neighbours of a claim's order, over the seeds that both have."""
    found = []
    for better, worse in zip(claim.order, claim.order[1:], strict=False):
        sign = 1 if claim.metric.higher_is_better else -1
        seeds = [seed for seed in results.seeds(better) if seed in results.seeds(worse)]
        pairs = [(results.value(better, s, claim.metric), results.value(worse, s, claim.metric)) for s in seeds]
        differences = tuple(sign * (a - b) for a, b in pairs if a is not None and b is not None)
        found.append(Comparison(better, worse, differences, max(1, claim.metric.digits)))
    return found


def verdict(comparisons: list[Comparison]) -> str:
    """Of a whole order: held, reversed, within the noise (all pairs alike), in part, not at all, or too few seeds."""
    found = {comparison.verdict for comparison in comparisons}
    if len(found) == 1:
        return found.pop()
    if MISSING in found:
        return MISSING
    return "in part" if HELD in found else "did not hold"


def same_latents(results: Results) -> tuple[int, int]:
    """(seeds for which Stage 3 left the latents as they were, seeds looked at)."""
    seeds = results.seeds(STAGE_BY_STAGE)
    same = [
        results.fingerprint(STAGE_BY_STAGE, s, "stage2") == results.fingerprint(STAGE_BY_STAGE, s, "stage3")
        for s in seeds
    ]
    return sum(same), len(same)
