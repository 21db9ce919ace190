"""Training and measuring of the rows, the most telling first: all tokenizers, a generator on each, then the curves.

Everything finished is found again: the same command continues an interrupted study. Several processes can share an
output folder when they work on different seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from aligntok.config import Recipe
from aligntok.config.from_dict import from_dict
from aligntok.config.options import StudyConfig
from aligntok.diffusion.sampler import check_sampler
from aligntok.errors import UserError
from aligntok.evaluation.generated import require_enough
from aligntok.runtime.clock import Clock
from aligntok.runtime.devices import choose_precision
from aligntok.study.measure import Bench, Point, fingerprint
from aligntok.study.report import report_file, write_report
from aligntok.study.rows import (
    COMPARED,
    GENERATOR_OF_TEXT,
    STAGE_BY_STAGE,
    Row,
    borrow_stages,
    choose,
    copy_folder,
    remember,
    values_of,
)
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.train_generator import PART, snapshot_folder, train_generator
from aligntok.training.train_tokenizer import STAGES, train_tokenizer
from aligntok.zoo.train_rival import train_rival

Part = Callable[[Row, list[Row], Bench, StudyConfig], None]


def study(options: StudyConfig) -> None:
    """`aligntok study`; the options are those of aligntok.config.options.StudyConfig."""
    telemetry = Telemetry(options.output, log_every=1)
    report_file(options)
    if not options.report_only:
        run(options, telemetry)
    telemetry.say(f"study: {write_report(options)}")


def run(options: StudyConfig, telemetry: Telemetry) -> None:
    """Train and measure what is missing."""
    output = Path(options.output)
    names = choose(options.only, options.text)
    rows = [Row(name, seed, output, options.budget, options.text) for seed in options.seeds for name in names]
    base: Recipe = from_dict(Recipe, values_of(GENERATOR_OF_TEXT if options.text else "base"))
    _check(options, rows, base)
    remember(output, options.budget, options.samples, options.text)
    bench = Bench(base, choose_precision("auto"), options.samples)
    parts: tuple[Part, ...] = (_tokenizer, _generator, _convergence)
    for part in parts if options.text else (*parts, _sampling):
        for number, row in enumerate(rows):
            telemetry.say(f"study: {part.__name__[1:]} {number + 1} of {len(rows)}: {row.name}, seed {row.seed}")
            part(row, rows, bench, options)


def _check(options: StudyConfig, rows: list[Row], base: Recipe) -> None:
    """Raise UserError now for what would end the study after hours."""
    if not rows or options.budget < 1 or min(options.sampling_steps, default=2) < 2:
        raise UserError(
            f"study: seeds {list(options.seeds)}, budget {options.budget}, steps {list(options.sampling_steps)}: "
            "expected at least one seed, a budget of at least 1, and sampling steps of at least 2"
        )
    require_enough(options.samples, "samples (--samples)")
    sampler = replace(base.generator.sampler, guidance=options.guidance)
    check_sampler(sampler, base.tokenizer.model.adapter.latent_channels)
    if find_spec("peft") is None and any(row.recipe().tokenizer.model.encoder.lora_rank for row in rows):
        raise UserError(
            "the study's row lora needs peft: pip install 'aligntok[peft]', or name the other rows with --only"
        )


def _tokenizer(row: Row, rows: list[Row], bench: Bench, options: StudyConfig) -> None:
    recipe = row.recipe()
    if not row.is_rival:
        borrow_stages(row, _relatives(row, rows))
    with Clock(row.folder / "times.json").part("tokenizer"):
        if row.is_rival:
            train_rival(recipe)
            _set_aside(row)
        else:
            train_tokenizer(recipe)
    bench.measure_tokenizer(row, "final", row.folder / "tokenizer")
    if row.name == STAGE_BY_STAGE:
        for stage in STAGES:
            bench.measure_tokenizer(row, stage, row.folder / stage / "tokenizer")


def _set_aside(row: Row) -> None:
    """Rename the generator that came with a tokenizer (REPA-E): every row gets one trained like the others'."""
    joint = row.folder / "joint_generator"
    if row.recipe().rival.kind == "repa-e" and not joint.exists():
        (row.folder / PART).rename(joint)


def _generator(row: Row, rows: list[Row], bench: Bench, options: StudyConfig) -> None:
    recipe = row.recipe()
    for other in _relatives(row, rows):
        _borrow_generator(row, other)
    with Clock(row.folder / "times.json").part("generator"):
        folder = train_generator(recipe)
    for guidance in (1.0, options.guidance):
        point = Point(recipe.generator.steps, recipe.generator.sampler.steps, guidance)
        bench.measure_generator(row, folder, point, closely=True)
    bench.measure_perfect(row)
    bench.draw_sheet(row, folder, options.guidance)


def _borrow_generator(row: Row, other: Row) -> None:
    """Take over the generator of a row with the same latents and the same recipe: Stage 3 needs no new one."""
    own, given = row.folder / PART, other.folder / PART
    if (own / "config.json").is_file() or not (given / "config.json").is_file():
        return
    if fingerprint(row) == fingerprint(other) and row.recipe().generator == other.recipe().generator:
        copy_folder(given, own)


def _convergence(row: Row, rows: list[Row], bench: Bench, options: StudyConfig) -> None:
    config = row.recipe().generator
    if row.name in COMPARED:
        for steps in range(config.snapshot_every, config.steps, config.snapshot_every):
            point = Point(steps, config.sampler.steps, 1.0)
            bench.measure_generator(row, snapshot_folder(row.folder, steps), point, closely=True)


def _sampling(row: Row, rows: list[Row], bench: Bench, options: StudyConfig) -> None:
    if row.name in COMPARED:
        for steps in options.sampling_steps:
            bench.measure_generator(
                row, row.folder / PART, Point(row.recipe().generator.steps, steps, 1.0), closely=True
            )


def _relatives(row: Row, rows: list[Row]) -> list[Row]:
    return [other for other in rows if other.seed == row.seed and other.name != row.name]
