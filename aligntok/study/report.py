"""The study in Markdown: tables with spread over seeds, the paper's findings with verdicts, plots and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from aligntok.config import EvaluationConfig
from aligntok.config.options import StudyConfig
from aligntok.data.geometry import to_unit_range
from aligntok.data.images import load_center_crops, open_images, told_before
from aligntok.errors import UserError
from aligntok.evaluation.checks import require_writable
from aligntok.report.pictures import contact_sheet
from aligntok.runtime.files import write_bytes
from aligntok.study import plots
from aligntok.study.findings import same_latents
from aligntok.study.measure import Point, pictures_of
from aligntok.study.results import (
    ABOVE,
    CEILING,
    GFD,
    LEARNED_METRICS,
    REAL_METRICS,
    TEXT_METRICS,
    TOKENIZER_METRICS,
    Metric,
    Results,
    spread,
)
from aligntok.study.rows import COMPARED, NAMES, STAGE_BY_STAGE, Row
from aligntok.study.verdicts import findings, markdown, speed

SHEET = 1_000_000  # bytes of a picture: all rows of the study fit in true colours
PARTS = ("tokenizer", "generator")  # of training, as times.json has them
CONVERGENCE = {GFD: "convergence.png", ABOVE: "convergence_above.png"}
SAMPLING = {GFD: "sampling.png", ABOVE: "sampling_above.png"}
STAGE_NAMES = {"stage1": "after Stage 1", "stage2": "after Stage 2", "stage3": "after Stage 3"}
TOKENIZER_NOTE = (
    "The spread is that of training: the held-out pictures and the folds of the probe are the same for all seeds. The "
    "probe reads all pictures, nine tenths of which the tokenizers were trained on."
)
REAL_NOTE = (
    "Distances to real pictures judge decoders as much as generators. A linear classifier on the extractor's features "
    "of real pictures looks for the classes; of a perfect generator, which is played by reconstructions of real "
    "pictures, it recognises what the last column says"
)
LEARNED_NOTE = (
    "How well a generator has learned its latents: distances of samples to the tokenizer's own reconstructions of real "
    "pictures, less those of a perfect generator (reconstructions of other real pictures). gFD rises with few samples "
    "and falls with samples that are too much alike; gKD does not."
)


TEXT_NOTE = (
    "Whether a picture shows its caption: a linear map from the extractor's features to those of captions, fitted on "
    "the real pictures that generators are trained on, picks one of ten captions; chance is 0.1. CLIP's score, which "
    "is what others report, needs weights that no package carries."
)


def write_report(options: StudyConfig) -> Path:
    """Write the Markdown file and, in a folder of its name, plots, pictures and results.json; returns the file."""
    file = report_file(options)
    results = Results(Path(options.output), options.guidance)
    folder = file.with_suffix("")
    kept = [name for name, data in _pictures(results).items() if _keep(folder / name, data)]
    text = "\n\n".join(_sections(results, folder.name, kept))
    write_bytes(folder / "results.json", json.dumps(results.as_document(), indent=1).encode())
    write_bytes(file, (text + "\n").encode())
    return file


def report_file(options: StudyConfig) -> Path:
    """The Markdown file of a study; UserError where it, or the folder of its pictures, could not be written."""
    file = Path(options.report or Path(options.output) / "study.md")
    require_writable(report=options.report)
    folder = file.with_suffix("")
    if folder == file or folder.is_file():
        raise UserError(
            f"--report {file}: its pictures go to the folder {folder}, which would be a file; give a name that ends in "
            ".md, and that no file has without it"
        )
    return file


def _keep(file: Path, data: bytes | None) -> bool:
    if data is not None:
        write_bytes(file, data)
    return data is not None


def _sections(results: Results, folder: str, kept: list[str]) -> Iterator[str]:
    yield "# The laptop study of text to image" if results.text else "# The laptop study"
    yield _head(results)
    yield f"## Tokenizers\n\n{TOKENIZER_NOTE}\n\n" + _table(results, TOKENIZER_METRICS)
    yield from _image(folder, kept, "trade_off.png", "linear probe against PSNR, one point for each row")
    yield f"## Generators\n\n{REAL_NOTE}{_recognisable(results)}.\n\n" + _table(results, REAL_METRICS)
    yield f"{LEARNED_NOTE}\n\n" + _table(results, LEARNED_METRICS)
    if results.text:
        yield f"{TEXT_NOTE}\n\n" + _table(results, TEXT_METRICS)
    if results.seeds(STAGE_BY_STAGE):
        yield "## Stage by stage\n\n" + _stages(results)
    yield "## The paper's findings at this size\n\n" + findings(results)
    yield "### How much sooner\n\n" + speed(results)
    for metric, name in CONVERGENCE.items():
        yield f"## Convergence by {metric.name}\n\n" + _convergence(results, metric)
        yield from _image(folder, kept, name, "against training steps; bands: lowest to highest seed")
    for metric, name in SAMPLING.items():
        if name in kept:
            yield f"## Sampling steps by {metric.name}\n\n" + _sampling(results, metric)
        yield from _image(folder, kept, name, "against network evaluations; bands: lowest to highest seed")
    yield "## Cost\n\n" + _cost(results)
    yield "## Pictures"
    yield from _image(folder, kept, "reconstructions.png", "held-out pictures above their reconstructions, first seed")
    shown = (
        f"one sample of each of {', '.join(EvaluationConfig().prompts)}"
        if results.text
        else "one sample of every class"
    )
    yield from _image(folder, kept, "samples.png", f"{shown}, first seed, with guidance")
    yield "## Protocols\n\n" + "\n".join(f"- {name}: {text}" for name, text in results.protocols().items())


def _head(results: Results) -> str:
    recipe = results.recipe
    seeds = {name: len(results.seeds(name)) for name in NAMES}
    most = max(seeds.values())
    command = "aligntok study" + (" --text true" if results.text else "")
    command += f" --budget {results.budget}" if results.budget > 1 else ""
    pictures = open_images(recipe.data.path, say=told_before).name
    text = (
        f"Written by `{command}`; measured on {'; '.join(results.machines)}; training took "
        f"{results.hours:.1f} hours by the clock of its processes. {pictures} at "
        f"{recipe.data.image_size} px, {recipe.data.held_out:.0%} held out. Every tokenizer has seen as many "
        "pictures as the others when its latents are fixed (`configs/study/`), and the same generator is trained on "
        f"each for {recipe.generator.steps} steps. Values are means over {most} seeds ± their standard deviation; "
        "in brackets how many, where a number has fewer than its row."
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
        values = [_told(results, name, results.all_of(name, metric), metric) for metric in metrics]
        lines.append([NAMES[name], str(results.channels(name)), *values])
    return markdown(lines)


def _told(results: Results, name: str, values: list[float], metric: Metric) -> str:
    """The values of a row's seeds as text; in brackets how many where they are fewer than the row's."""
    fewer = 0 < len(values) < len(results.seeds(name))
    return spread(values, metric.digits) + (f" ({len(values)})" if fewer else "")


def _arrow(name: str, higher: bool) -> str:
    return f"{name} {'↑' if higher else '↓'}"


def _stages(results: Results) -> str:
    metrics = TOKENIZER_METRICS
    head = ["AlignTok, d = 32", *(_arrow(metric.name, metric.higher_is_better) for metric in metrics)]
    lines = [head, ["---"] * len(head)]
    for stage, text in STAGE_NAMES.items():
        found = [results.all_of(STAGE_BY_STAGE, metric, stage) for metric in metrics]
        values = [_told(results, STAGE_BY_STAGE, *pair) for pair in zip(found, metrics, strict=True)]
        if any(values):
            lines.append([text, *values])
    same, looked = same_latents(results)
    return f"{markdown(lines)}\n\nLatents after Stage 3 equal to those before, to the bit: {same} of {looked} seeds."


def _recognisable(results: Results) -> str:
    """How far classes can be seen at all: the range over rows, and what naming the largest class would reach."""
    found = [value for name in results.rows(NAMES) for value in results.all_of(name, CEILING)]
    if not found:
        return ""
    labels = open_images(results.recipe.data.path, results.recipe.data.max_images, say=told_before).labels
    largest = labels.bincount().max().item() / len(labels)
    return f": {min(found):.0%} to {max(found):.0%} (always naming the largest class: {largest:.0%})"


def _convergence(results: Results, metric: Metric) -> str:
    steps = sorted({p.trained for name in results.rows(COMPARED) for p in results.points(name)})
    points = [Point(step, results.plain.sampling, 1.0) for step in steps]
    lines = _grid(results, points, [f"{step} steps" for step in steps], metric)
    return f"Without guidance; in brackets: of fewer seeds.\n\n{lines}"


def _sampling(results: Results, metric: Metric) -> str:
    evaluations = sorted({p.sampling for name in results.rows(COMPARED) for p in results.points(name)})
    points = [Point(results.plain.trained, count, 1.0) for count in evaluations]
    lines = _grid(results, points, [str(count) for count in evaluations], metric)
    return f"Without guidance, after all training steps; in brackets: of fewer seeds.\n\n{lines}"


def _cost(results: Results) -> str:
    """What a tokenizer costs; a stage that a row has borrowed from another is not in its minutes."""
    rows = results.rows(COMPARED)
    if not rows:
        return "None of the rows that the paper compares was trained."
    columns = list(results.cost(rows[0]))
    head = ["tokenizer", *columns, "tokenizer [min]", "generator [min]"]
    lines = [head, ["---"] * len(head)]
    for name in rows:
        counted = [f"{value:.2f}" for value in results.cost(name).values()]
        lines.append([NAMES[name], *counted, *(spread(results.minutes(name, part), 1) for part in PARTS)])
    return (
        "Parameters; FLOPs of one image's convolutions and matrix products, counted; minutes of training by the clock, "
        f"whatever else the machine did.\n\n{markdown(lines)}"
    )


def _grid(results: Results, points: list[Point], heads: list[str], metric: Metric) -> str:
    """One line for each compared row; in brackets the seeds of a value that has fewer than its row."""
    lines = [["tokenizer", *heads], ["---"] * (1 + len(heads))]
    for name in results.rows(COMPARED):
        cells = [_told(results, name, results.curve(name, point, metric), metric) for point in points]
        lines.append([NAMES[name], *cells])
    return markdown(lines)


def _pictures(results: Results) -> dict[str, bytes | None]:
    return {
        "trade_off.png": plots.trade_off(results),
        **{name: plots.convergence(results, metric) for metric, name in CONVERGENCE.items()},
        **{name: plots.sampling(results, metric) for metric, name in SAMPLING.items()},
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
        held_out = open_images(data.path, data.max_images, say=told_before).split(data.held_out)[1]
        shown = len(next(iter(rows.values())))
        originals = load_center_crops(held_out.subset(list(range(shown))), data.image_size)[0]
        rows = {"Original": to_unit_range(originals), **rows}
    return contact_sheet(rows, limit=SHEET)


def _image(folder: str, kept: list[str], name: str, text: str) -> Iterator[str]:
    if name in kept:
        yield f"![{text}]({folder}/{name})"
