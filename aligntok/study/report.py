"""The study in Markdown: tables with spread over seeds, the paper's findings with verdicts, plots and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from aligntok.data.geometry import to_unit_range
from aligntok.data.images import load_center_crops, open_images
from aligntok.files import write_bytes
from aligntok.options import StudyConfig
from aligntok.report.pictures import contact_sheet
from aligntok.study import plots
from aligntok.study.findings import CLAIMS, compare, same_latents, verdict
from aligntok.study.measure import Point, pictures_of
from aligntok.study.results import ABOVE, GENERATION_METRICS, GFD, TOKENIZER_METRICS, Metric, Results, spread
from aligntok.study.rows import COMPARED, NAMES, STAGE_BY_STAGE, Row

PARTS = ("tokenizer", "generator")  # of training, as times.json has them
CONVERGENCE = {GFD: "convergence.png", ABOVE: "convergence_above.png"}
STAGE_NAMES = {"stage1": "after Stage 1", "stage2": "after Stage 2", "stage3": "after Stage 3"}
GENERATORS = (
    "Distances to real pictures, and to the tokenizer's own reconstructions of real pictures. A perfect generator is "
    "played by reconstructions of other real pictures: what is above its distance is what the generator has not "
    "learned of the latents, as far as the decoder shows it. A linear classifier on the extractor's features of real "
    "pictures looks for the classes."
)


def write_report(options: StudyConfig) -> Path:
    """Write the Markdown file and, in a folder of its name, plots, pictures and results.json; returns the file."""
    file = Path(options.report or Path(options.output) / "study.md")
    results = Results(Path(options.output), options.guidance)
    folder = file.with_suffix("")
    kept = [name for name, data in _pictures(results).items() if _keep(folder / name, data)]
    text = "\n\n".join(_sections(results, folder.name, kept))
    write_bytes(folder / "results.json", json.dumps(results.as_document(), indent=1).encode())
    write_bytes(file, (text + "\n").encode())
    return file


def _keep(file: Path, data: bytes | None) -> bool:
    if data is not None:
        write_bytes(file, data)
    return data is not None


def _sections(results: Results, folder: str, kept: list[str]) -> Iterator[str]:
    yield "# The laptop study"
    yield _head(results)
    yield "## Tokenizers\n\n" + _table(results, TOKENIZER_METRICS)
    yield from _image(folder, kept, "trade_off.png", "linear probe against PSNR, one point for each row")
    yield f"## Generators\n\n{GENERATORS}\n\n" + _table(results, GENERATION_METRICS)
    if results.seeds(STAGE_BY_STAGE):
        yield "## Stage by stage\n\n" + _stages(results)
    yield "## The paper's findings at this size\n\n" + _findings(results)
    for metric, name in CONVERGENCE.items():
        yield f"## Convergence by {metric.name}\n\n" + _convergence(results, metric)
        yield from _image(folder, kept, name, "against training steps; bands: lowest to highest seed")
    yield "## Sampling steps\n\n" + _sampling(results)
    yield from _image(folder, kept, "sampling.png", "gFD against network evaluations; bands: lowest to highest seed")
    yield "## Cost\n\n" + _cost(results)
    yield "## Pictures"
    yield from _image(folder, kept, "reconstructions.png", "held-out pictures above their reconstructions, first seed")
    yield from _image(folder, kept, "samples.png", "one sample of every class, first seed, with guidance")
    yield "## Protocols\n\n" + "\n".join(f"- {name}: {text}" for name, text in results.protocols().items())


def _head(results: Results) -> str:
    recipe = results.recipe
    seeds = {name: len(results.seeds(name)) for name in NAMES}
    most = max(seeds.values())
    command = "aligntok study" + (f" --budget {results.budget}" if results.budget > 1 else "")
    text = (
        f"Written by `{command}`; measured on {'; '.join(results.machines)}; training took "
        f"{results.hours:.1f} hours by the clock of its processes. {open_images(recipe.data.path).name} at "
        f"{recipe.data.image_size} px, {recipe.data.held_out:.0%} held out. Every tokenizer has seen as many "
        "pictures as the others when its latents are fixed (`configs/study/`), and the same generator is trained on "
        f"each for {recipe.generator.steps} steps. Values are means over {most} seeds ± their standard deviation."
    )
    if results.budget > 1:
        text += f" Tokenizers and generators were trained {results.budget} times as long as the recipes say."
    short = {name: count for name, count in seeds.items() if 0 < count < most}
    if short:
        listed = ", ".join(f"{NAMES[name]} ({count})" for name, count in short.items())
        text += f" Fewer seeds: {listed}."
    return text


def _table(results: Results, metrics: tuple[Metric, ...]) -> str:
    head = ["tokenizer", "d", *(_arrow(metric.name, metric.higher_is_better) for metric in metrics)]
    lines = [head, ["---"] * len(head)]
    for name in results.rows(NAMES):
        values = [spread(results.all_of(name, metric), metric.digits) for metric in metrics]
        lines.append([NAMES[name], str(results.channels(name)), *values])
    return _markdown(lines)


def _arrow(name: str, higher: bool) -> str:
    return f"{name} {'↑' if higher else '↓'}"


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _stages(results: Results) -> str:
    metrics = TOKENIZER_METRICS
    head = ["AlignTok, d = 32", *(_arrow(metric.name, metric.higher_is_better) for metric in metrics)]
    lines = [head, ["---"] * len(head)]
    for stage, text in STAGE_NAMES.items():
        values = [spread(results.all_of(STAGE_BY_STAGE, metric, stage), metric.digits) for metric in metrics]
        if any(values):
            lines.append([text, *values])
    same, looked = same_latents(results)
    return f"{_markdown(lines)}\n\nLatents after Stage 3 equal to those before, to the bit: {same} of {looked} seeds."


def _findings(results: Results) -> str:
    lines = [["the paper", "its numbers", "metric here", "verdict", "pairs"], ["---"] * 5]
    asked = [claim for claim in CLAIMS if all(results.seeds(name) for name in claim.order)]
    for claim in asked:
        pairs = compare(results, claim)
        lines.append([claim.text, claim.paper, claim.metric.name, f"**{verdict(pairs)}**", "; ".join(map(str, pairs))])
    rule = (
        "Differences are taken seed by seed; held and reversed need Student's one-sided 5 % point, anything less is "
        "within the noise. An order of which some neighbours held, but not all, held in part."
    )
    if len(asked) < len(CLAIMS):
        rule += f" {len(CLAIMS) - len(asked)} more findings are about rows that were not trained."
    return f"{rule}\n\n{_markdown(lines)}"


def _convergence(results: Results, metric: Metric) -> str:
    steps = sorted({p.trained for name in results.rows(COMPARED) for p in results.points(name)})
    points = [Point(step, results.plain.sampling, 1.0) for step in steps]
    lines = _grid(results, points, [f"{step} steps" for step in steps], metric)
    return f"Without guidance; in brackets: of fewer seeds.\n\n{lines}\n\n{_sooner(results, points, metric)}"


def _sooner(results: Results, points: list[Point], metric: Metric) -> str:
    """How many steps AlignTok needs for what VA-VAE has at the end."""
    last = points[-1].trained
    means = {
        name: {p.trained: statistics.fmean(values) for p in points if (values := results.curve(name, p, metric))}
        for name in ("va_vae", "aligntok")
    }
    if not all(last in found for found in means.values()):
        return ""
    goal, end = means["va_vae"][last], means["aligntok"][last]
    if end > goal:
        return (
            f"AlignTok ends at {end:.{metric.digits}f} and VA-VAE at {goal:.{metric.digits}f}: there is no sooner to "
            "speak of (the paper: about five times)."
        )
    step = next(step for step, mean in means["aligntok"].items() if mean <= goal)
    return (
        f"AlignTok has what VA-VAE has after {last} steps ({goal:.{metric.digits}f}) by step {step}: "
        f"{last / step:.1f} times sooner, as far as the snapshots tell (the paper: about five times)."
    )


def _sampling(results: Results) -> str:
    evaluations = sorted({p.sampling for name in results.rows(COMPARED) for p in results.points(name)})
    points = [Point(results.plain.trained, count, 1.0) for count in evaluations]
    return f"{GFD.name} without guidance, after all training steps; in brackets: of fewer seeds.\n\n" + _grid(
        results, points, [str(count) for count in evaluations], GFD
    )


def _cost(results: Results) -> str:
    """What a tokenizer costs; a stage that a row has borrowed from another is not in its minutes."""
    rows = results.rows(COMPARED)
    columns = list(results.cost(rows[0]))
    head = ["tokenizer", *columns, "tokenizer [min]", "generator [min]"]
    lines = [head, ["---"] * len(head)]
    for name in rows:
        counted = [f"{value:.2f}" for value in results.cost(name).values()]
        lines.append([NAMES[name], *counted, *(spread(results.minutes(name, part), 1) for part in PARTS)])
    return (
        "Parameters; FLOPs of one image's convolutions and matrix products, counted; minutes of training by the clock, "
        f"whatever else the machine did.\n\n{_markdown(lines)}"
    )


def _grid(results: Results, points: list[Point], heads: list[str], metric: Metric) -> str:
    """One line for each compared row; in brackets the seeds of a value that has fewer than its row."""
    lines = [["tokenizer", *heads], ["---"] * (1 + len(heads))]
    for name in results.rows(COMPARED):
        cells = []
        for point in points:
            values = results.curve(name, point, metric)
            fewer = 0 < len(values) < len(results.seeds(name))
            cells.append(spread(values, metric.digits) + (f" ({len(values)})" if fewer else ""))
        lines.append([NAMES[name], *cells])
    return _markdown(lines)


def _pictures(results: Results) -> dict[str, bytes | None]:
    return {
        "trade_off.png": plots.trade_off(results),
        **{name: plots.convergence(results, metric) for metric, name in CONVERGENCE.items()},
        "sampling.png": plots.sampling(results),
        "reconstructions.png": _sheet(results, "reconstructions"),
        "samples.png": _sheet(results, "samples"),
    }


def _sheet(results: Results, what: str) -> bytes | None:
    """One row of pictures for each tokenizer, of its first seed."""
    rows: dict[str, Tensor] = {}
    for name in results.rows(NAMES):
        kept = pictures_of(Row(name, results.seeds(name)[0], results.output))
        if what in kept:
            rows[NAMES[name]] = to_unit_range(kept[what])
    if not rows:
        return None
    if what == "reconstructions":
        data = results.recipe.data
        held_out = open_images(data.path, data.max_images).split(data.held_out)[1]
        shown = len(next(iter(rows.values())))
        originals = load_center_crops(held_out.subset(list(range(shown))), data.image_size)[0]
        rows = {"Original": to_unit_range(originals), **rows}
    return contact_sheet(rows)


def _image(folder: str, kept: list[str], name: str, text: str) -> Iterator[str]:
    if name in kept:
        yield f"![{text}]({folder}/{name})"
