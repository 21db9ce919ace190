"""The numbers of a study, read from its folder: one value for each row, seed and metric."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntok.errors import UserError
from aligntok.runtime.files import read_document
from aligntok.study.measure import Point
from aligntok.study.rows import NAMES, Row, known_budget, reads_captions

EXTRACTOR = "EffNetLite0"


@dataclass(frozen=True)
class Metric:
    """A number of the tables: where it lies in measures.json, and which way is better."""

    name: str  # in print
    kind: str  # "reconstruction", "probe", "alignment", "generation", or "perfect" for a perfect generator's
    key: str
    higher_is_better: bool
    digits: int = 3
    guided: bool = False  # of a generation: with the study's guidance
    above_perfect: bool = False  # of a generation: less the perfect generator's


PSNR = Metric("PSNR [dB]", "reconstruction", "PSNR [dB]", True, 2)
SSIM = Metric("SSIM", "reconstruction", "SSIM", True)
PERCEPTUAL = Metric("ST-LPIPS", "reconstruction", "ST-LPIPS", False)
RFD = Metric(f"rFD-{EXTRACTOR}", "reconstruction", f"rFD-{EXTRACTOR}", False, 0)
PROBE = Metric("probe", "probe", "mean", True)
FLATTENED = Metric("probe, flattened", "probe", "flattened", True)
CKNNA = Metric("CKNNA", "alignment", "CKNNA", True)
GFD = Metric(f"gFD-{EXTRACTOR}", "generation", f"gFD-{EXTRACTOR}", False, 0)
GKD = Metric(f"gKD-{EXTRACTOR}", "generation", f"gKD-{EXTRACTOR}", False)
GUIDED = Metric(f"gFD-{EXTRACTOR}, guided", "generation", f"gFD-{EXTRACTOR}", False, 0, guided=True)
OWN = Metric(f"own gFD-{EXTRACTOR}", "generation", f"own gFD-{EXTRACTOR}", False, 0)
FLOOR = Metric(f"{OWN.name} of a perfect generator", "perfect", OWN.key, False, 0)
ABOVE = Metric(f"gFD-{EXTRACTOR} above a perfect generator", "generation", OWN.key, False, 1, above_perfect=True)
ABOVE_KD = Metric(
    f"gKD-{EXTRACTOR} above a perfect generator", "generation", f"own gKD-{EXTRACTOR}", False, above_perfect=True
)
CEILING = Metric("class recognised, of a perfect generator", "perfect", "recognised", True)
RECOGNISED = Metric("class recognised", "generation", "recognised", True)
FOUND = Metric("caption found of 10", "generation", "found", True)
FOUND_GUIDED = Metric("caption found of 10, guided", "generation", "found", True, guided=True)
FOUND_CEILING = Metric("caption found, of a perfect generator", "perfect", "found", True)
RECOGNISED_GUIDED = Metric("class recognised, guided", "generation", "recognised", True, guided=True)
TOKENIZER_METRICS = (PSNR, SSIM, PERCEPTUAL, RFD, PROBE, FLATTENED, CKNNA)
REAL_METRICS = (GFD, GUIDED, GKD, RECOGNISED, RECOGNISED_GUIDED, CEILING)
TEXT_METRICS = (FOUND, FOUND_GUIDED, FOUND_CEILING)
LEARNED_METRICS = (OWN, FLOOR, ABOVE, ABOVE_KD)


class Results:
    """All measures below `output`.

    Args:
        output: folder of the study.
        guidance: scale of the guided columns.

    Raises:
        UserError: nothing has been measured there.
    """

    def __init__(self, output: Path, guidance: float) -> None:
        self.output = output
        self._values: dict[tuple[str, int], dict[str, Any]] = {}
        self._seconds: dict[tuple[str, int], dict[str, float]] = {}
        for name in NAMES:
            for folder in sorted((output / name).glob("seed-*")):
                seed = re.fullmatch(r"seed-(-?\d+)", folder.name)  # not the copies that somebody keeps beside them
                if seed is not None and (folder / "measures.json").is_file():
                    self._values[name, int(seed[1])] = read_document(folder / "measures.json")
                    self._seconds[name, int(seed[1])] = read_document(folder / "times.json")
        if not self._values:
            raise UserError(f"{output} holds no measured row of a study; run aligntok study --output {output} first")
        first = next(iter(self._values))
        self.budget, self.text = known_budget(output), reads_captions(output)
        self.recipe = Row(*first, output, self.budget, self.text).recipe()
        config = self.recipe.generator
        self.plain = Point(config.steps, config.sampler.steps, 1.0)
        self.guided = Point(config.steps, config.sampler.steps, guidance)

    def rows(self, names: dict[str, str]) -> list[str]:
        """Those of `names` that have been measured for some seed."""
        return [name for name in names if self.seeds(name)]

    def seeds(self, name: str) -> list[int]:
        """Seeds that a row was measured for."""
        return sorted(seed for row, seed in self._values if row == name)

    def value(self, name: str, seed: int, metric: Metric, stage: str = "final") -> float | None:
        """One number; None where it has not been measured."""
        if metric.kind == "generation":
            return self.generation(name, seed, self.guided if metric.guided else self.plain, metric)
        values = self._values.get((name, seed), {})
        measured = values if metric.kind == "perfect" else values.get("tokenizers", {}).get(stage, {})
        return measured.get(metric.kind, {}).get(metric.key)

    def generation(self, name: str, seed: int, point: Point, metric: Metric) -> float | None:
        """One number of a generator at a point; None where it has not been measured."""
        values = self._values.get((name, seed), {})
        found = values.get("generations", {}).get(str(point), {}).get(metric.key)
        if found is None or not metric.above_perfect:
            return found
        perfect = values.get("perfect", {}).get(metric.key)
        return None if perfect is None else found - perfect

    def points(self, name: str) -> list[Point]:
        """Points at which a row's generators have been measured for some seed."""
        found = {p for seed in self.seeds(name) for p in self._values[name, seed]["generations"]}
        return sorted(map(Point.parse, found), key=lambda p: (p.trained, p.sampling, p.guidance))

    def curve(self, name: str, point: Point, metric: Metric) -> list[float]:
        """Values at one point, one for each seed that has it."""
        values = (self.generation(name, seed, point, metric) for seed in self.seeds(name))
        return [value for value in values if value is not None]

    def all_of(self, name: str, metric: Metric, stage: str = "final") -> list[float]:
        """Values of a row, one for each seed that has it."""
        values = (self.value(name, seed, metric, stage) for seed in self.seeds(name))
        return [value for value in values if value is not None]

    def fingerprint(self, name: str, seed: int, stage: str) -> str | None:
        """Of the latents after a stage; None where it has not been measured."""
        return self._values[name, seed]["tokenizers"].get(stage, {}).get("fingerprint")

    def channels(self, name: str) -> int:
        return self._values[name, self.seeds(name)[0]]["tokenizers"]["final"]["channels"]

    def cost(self, name: str) -> dict[str, float]:
        """Parameters and FLOPs of a row's tokenizer."""
        return self._values[name, self.seeds(name)[0]]["tokenizers"]["final"].get("cost", {})

    def minutes(self, name: str, part: str) -> list[float]:
        """Processor-minutes that training "tokenizer" or "generator" took, one for each seed."""
        times = [self._seconds[name, seed] for seed in self.seeds(name)]
        return [seconds[part] / 60 for seconds in times if part in seconds]

    @property
    def hours(self) -> float:
        """All training."""
        return sum(sum(seconds.values()) for seconds in self._seconds.values()) / 3600

    @property
    def machines(self) -> list[str]:
        """What the numbers were taken on, one line for each machine, number of threads, torch and date."""
        kept = (values["machine"] for values in self._values.values())
        lines = (f"{m['processor']}, threads: {m['threads']}, torch {m['torch']}, {m['date']}" for m in kept)
        return sorted(set(lines))

    def protocols(self) -> dict[str, str]:
        """How each kind of number was taken of the first row that has it, and which row that is."""
        found: dict[str, str] = {}
        for (name, seed), values in self._values.items():
            for kind, text in values["protocols"].items():
                found.setdefault(kind, f"{text} ({NAMES[name]}, seed {seed})")
        return found

    def as_document(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {f"{name}/seed-{seed}": values for (name, seed), values in self._values.items()}


def spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation over seeds, as text: `17.31 ± 0.05`."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
