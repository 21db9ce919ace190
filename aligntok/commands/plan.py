"""What a recipe will take: parameters, memory per GPU, communication, FLOPs and hours, predicted before anything runs.

Everything is counted on the meta device by aligntok.training.monitoring.cost; nothing is downloaded or written. Parts
are the stages of the tokenizer, or the rival in its place, and the generator.

    memory    weights + gradients + optimizer + averages + activations of a micro-batch; DDP: all of them; FSDP2: a
              share of what trains, and three times the largest block: gathered, gathered ahead, its gradient
    sent      per GPU and step; DDP: 2 (n-1)/n of the gradients (ring all-reduce); FSDP2: 3 (n-1)/n of the trained
              weights (gathered forward and backward, gradients scattered)
    img/s     n * mfu * peak / FLOPs per image

`mfu` is the share of the GPU's peak that the counted FLOPs reach: an assumption, not a measurement. Waiting for images,
communication that is not hidden, validation and checkpoints are not in the prediction.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from aligntok.config import (
    DataConfig,
    GeneratorTrainingConfig,
    LightningDiTConfig,
    Recipe,
    RivalConfig,
    RivalStageConfig,
    StageConfig,
    StagesConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
)
from aligntok.config.ranges import check_ranges
from aligntok.data.geometry import check_size
from aligntok.errors import UserError
from aligntok.models.tokenizer import AlignTok, StoredTokenizer
from aligntok.runtime.files import write_bytes
from aligntok.runtime.world import World
from aligntok.training.distributed import check_accumulate
from aligntok.training.monitoring import cost
from aligntok.training.monitoring.cost import Cost
from aligntok.training.monitoring.ledger.assumptions import GPUS
from aligntok.training.sizes import check_buckets, counted_size, refuse_buckets
from aligntok.training.train_tokenizer import STAGES, check_stage
from aligntok.zoo.building import latent_shape as rival_shape
from aligntok.zoo.building import rival_cost
from aligntok.zoo.finished import network_of

CHECKPOINTING = ("none", "selective", "full")
PARTS = (*STAGES, "generator", "rival")
Update = Callable[[int, int, str], None]


USABLE = 0.9  # of the memory: the rest is for the CUDA context, workspaces of cuDNN and cuBLAS, fragmentation
UNKNOWN_CLASSES = 1000  # where the recipe leaves the number to the images: a row of one table each


@dataclasses.dataclass
class PlanConfig:
    """Options of `aligntok plan` beside the recipe's."""

    gpus: list[int] = dataclasses.field(default_factory=lambda: [1, 8])
    gpu: Literal["a100-80gb", "h100-sxm", "h200", "l40s"] = "h100-sxm"
    mfu: float = 0.4
    json: str | None = None
    parts: list[str] | None = None  # None = all that the recipe has
    step: bool = False  # the ledger of a step instead (aligntok.commands.plan_step)
    all: bool = False  # every line of it
    measured: str | None = None  # gpu_check_<device>.json, whose numbers replace assumptions


def plan(recipe: Recipe, options: PlanConfig, parts: tuple[str, ...], update: Update | None = None) -> dict[str, Any]:
    """The prediction for some of a recipe's parts, as plain data.

    Args:
        recipe: everything about the training.
        options: for how many of which GPUs, and how well they are assumed to be used.
        parts: some of PARTS; stages without steps are left out.
        update: called with (counts done, counts in all, what is counted next).

    Raises:
        UserError: networks that do not fit together, a batch that cannot be divided, an option out of range.
    """
    check(recipe, options, parts)
    jobs = [(part, mode) for part in parts for mode in modes(recipe, part, every=len(options.gpus) > 1)]
    found: dict[str, Any] = {"prediction": True, "gpu": options.gpu, "mfu": options.mfu, "parts": {}, "rows": []}
    for done, (part, mode) in enumerate(jobs):
        if update is not None:
            update(done, len(jobs), part if mode == "none" else f"{part}, {mode} checkpointing")
        summary, rows = _part(recipe, part, mode, options)
        found["parts"].setdefault(part, summary)
        found["rows"] += rows
    found["forward_flops_per_image"] = _forward(recipe, parts)
    found["counted_size"] = counted_size(recipe.data)
    if update is not None:
        update(len(jobs), len(jobs), "")
    return found


def parts_of(recipe: Recipe) -> tuple[str, ...]:
    """All parts of a recipe; REPA-E trains its generator with the rival."""
    if recipe.rival == RivalConfig():
        return (*STAGES, "generator")
    return ("rival",) if recipe.rival.kind == "repa-e" else ("rival", "generator")


def modes(recipe: Recipe, part: str, every: bool) -> list[str]:
    """Ways of checkpointing to plan a part with: its own and, of the generator and if asked for, every one; [] for a
    stage without steps."""
    if part == "generator":
        return list(CHECKPOINTING) if every else [recipe.generator.training.checkpointing]
    if part == "rival":
        return [recipe.rival.training.checkpointing]
    stage = getattr(recipe.tokenizer.stages, part)
    return [recipe.tokenizer.training.checkpointing if "encoder" in stage.trains else "none"] if stage.steps else []


def check(recipe: Recipe, options: PlanConfig, parts: tuple[str, ...]) -> None:
    """Raise UserError for a recipe or options that cannot be planned."""
    check_ranges(recipe)
    for name in set(parts) & set(STAGES):
        check_stage(name, getattr(recipe.tokenizer.stages, name), recipe.tokenizer.losses)
    if recipe.rival != RivalConfig() and any(part in STAGES for part in parts):
        raise UserError(
            f"the recipe trains a rival ({recipe.rival.kind}) in the place of AlignTok's stages: plan the parts "
            f"{' and '.join(parts_of(recipe))}, or give another recipe"
        )
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu is {options.mfu}, expected a share of the peak such as 0.4")
    if not options.gpus or min(options.gpus) < 1:
        raise UserError(f"--gpus is {options.gpus}, expected positive numbers such as --gpus 1 8")


def _part(recipe: Recipe, part: str, mode: str, options: PlanConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    training, steps, count = _counter(recipe, part, mode)
    accumulate = training.accumulate
    micro = {gpus: rows_at_once(training, gpus) for gpus in options.gpus}
    ends = [count(size) for size in sorted({min(micro.values()), max(micro.values())})]
    rows = []
    for gpus in options.gpus:
        for parallel in ("ddp", "fsdp") if gpus > 1 and part != "rival" else ("ddp",):
            here = _between(ends, micro[gpus])
            row: dict[str, Any] = {"part": part, "gpus": gpus, "parallel": parallel if gpus > 1 else "-"}
            row |= {"checkpointing": mode, "micro_batch": micro[gpus], "accumulate": accumulate}
            row |= memory(here, gpus, parallel)
            row["fits"] = row["total"] <= USABLE * GPUS[options.gpu].memory
            rate = gpus * options.mfu * GPUS[options.gpu].peak[precision_of(training)] / (here.flops / here.micro_batch)
            row |= {"images_per_second": rate, "hours": steps * training.batch_size / rate / 3600}
            rows.append(row)
    counted = ends[0]
    summary: dict[str, Any] = {"steps": steps, "batch_size": training.batch_size, "precision": precision_of(training)}
    summary |= {"parameters": counted.parameters, "step_flops_per_image": counted.flops / counted.micro_batch}
    return summary, rows


def precision_of(training: TrainingConfig) -> str:
    """Every GPU here computes in bf16."""
    return "bf16" if training.precision == "auto" else training.precision


def _counter(recipe: Recipe, part: str, mode: str) -> tuple[TrainingConfig, int, Callable[[int], Cost]]:
    """(training options, steps, cost for a micro-batch) of a part."""
    if part == "generator":
        generator = recipe.generator
        count = partial(cost.once, cost.generator_cost, generator_alone(recipe), latent_shape(recipe))
        return generator.training, generator.steps, lambda n: count(n, mode)
    if part == "rival":
        count = partial(cost.once, rival_cost, _decisive_rival(recipe))
        return recipe.rival.training, recipe.rival.stage.steps, lambda n: count(n, mode)
    count = partial(cost.once, cost.tokenizer_cost, *stage_alone(recipe, part), recipe.data.image_size)
    stage = getattr(recipe.tokenizer.stages, part)
    return recipe.tokenizer.training, stage.steps, lambda n: count(n, mode)


def generator_alone(recipe: Recipe) -> GeneratorTrainingConfig:
    """The generator's configuration without what changes no cost of a step."""
    generator = recipe.generator
    training = TrainingConfig(precision=generator.training.precision)
    return GeneratorTrainingConfig(
        condition=generator.condition, model=labelled(generator.model), text=generator.text, training=training
    )


def stage_alone(recipe: Recipe, part: str) -> tuple[TokenizerTrainingConfig, StageConfig]:
    """The configuration of one stage without what changes no cost of a step, and the stage as `decisive` has it."""
    training = TrainingConfig(precision=recipe.tokenizer.training.precision)
    config = dataclasses.replace(recipe.tokenizer, stages=StagesConfig(), training=training)
    return config, decisive(getattr(recipe.tokenizer.stages, part))


def decisive(stage: StageConfig) -> StageConfig:
    """A stage of one step that costs the same: with its adversarial loss, and no number that changes no shape."""
    semantic = dataclasses.replace(stage.semantic, weight=float(stage.semantic.weight > 0))
    averages = None if stage.ema_decay is None else 0.5
    never = int(stage.gan_start >= stage.steps)
    return StageConfig(stage.trains, steps=1, gan_start=never, semantic=semantic, ema_decay=averages)


def _decisive_rival(recipe: Recipe) -> Recipe:
    """A recipe of a rival's single step with its adversarial loss, which costs what the rival's steps cost."""
    stage = recipe.rival.stage
    averages = None if stage.ema_decay is None else 0.5
    never = int(stage.gan_start >= stage.steps)
    rival = dataclasses.replace(
        recipe.rival,
        stage=RivalStageConfig(steps=1, gan_start=never, ema_decay=averages),
        training=TrainingConfig(precision=recipe.rival.training.precision),
    )
    generator = GeneratorTrainingConfig(model=labelled(recipe.generator.model))
    return Recipe(rival=rival, generator=generator, data=DataConfig(image_size=recipe.data.image_size))


def labelled(model: LightningDiTConfig) -> LightningDiTConfig:
    """The generator's configuration with a number of classes."""
    return dataclasses.replace(model, classes=UNKNOWN_CLASSES if model.classes is None else model.classes)


def latent_shape(recipe: Recipe) -> tuple[int, int, int]:
    """(d, h, w) of the recipe's latents; UserError if the image size is not a multiple of the downsampling."""
    if recipe.rival != RivalConfig():
        return cost.once(rival_shape, recipe.rival, recipe.data.image_size)
    config, size = recipe.tokenizer.model, recipe.data.image_size
    check_size(size, config.encoder.downsample)
    side = size // config.encoder.downsample
    return config.adapter.latent_channels, side, side


def rows_at_once(training: TrainingConfig, gpus: int) -> int:
    """The images of a micro-batch on one of several GPUs; UserError if a step's cannot be divided so."""
    rows = len(World(0, gpus).rows(training.batch_size))
    check_accumulate(training.accumulate, rows)
    return rows // training.accumulate


def _between(ends: list[Cost], micro_batch: int) -> Cost:
    """The cost at a micro-batch between two counted ones: the peak grows with the batch along straight pieces that turn
    upwards, so that a straight line between two counts is never below it."""
    low, high = ends[0], ends[-1]
    if low is high:
        return low
    share = (micro_batch - low.micro_batch) / (high.micro_batch - low.micro_batch)
    names = ("activations", "saved", "flops")
    values = {n: round(getattr(low, n) + share * (getattr(high, n) - getattr(low, n))) for n in names}
    return dataclasses.replace(low, micro_batch=micro_batch, **values)


def memory(counted: Cost, gpus: int, parallel: str) -> dict[str, int]:
    """Bytes on each GPU, and bytes that each one sends per step; formulas in the module's docstring."""
    sharded = parallel == "fsdp" and gpus > 1
    share = gpus if sharded else 1
    found = {
        "weights": counted.frozen + counted.trained // share + (2 * counted.largest_unit if sharded else 0),
        "gradients": counted.gradients // share + (counted.largest_unit if sharded else 0),
        "optimizer": counted.optimizer // share,
        "averages": counted.averages // share,
        "activations": counted.activations,
    }
    found["total"] = sum(found.values())
    found["sent"] = (3 if sharded else 2) * counted.trained * (gpus - 1) // gpus
    return found


def _forward(recipe: Recipe, parts: tuple[str, ...]) -> dict[str, int]:
    rival = recipe.rival != RivalConfig() or "rival" in parts
    kind: type[StoredTokenizer]
    kind, config = network_of(recipe.rival) if rival else (AlignTok, recipe.tokenizer.model)
    found = dict(cost.once(cost.forward_flops, kind, config, recipe.data.image_size))
    if "generator" in parts:
        found["generator evaluation"] = cost.once(
            cost.generator_forward_flops, generator_alone(recipe), latent_shape(recipe)
        )
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """Print a plan as tables."""
    networks = Table(title="parameters in millions, trained + frozen; FLOPs counted, not measured")
    for name in ("part", "networks", "batch", "steps", "GFLOP per image and step"):
        networks.add_column(name, justify="left" if name in ("part", "networks") else "right")
    for part, summary in found["parts"].items():
        texts = (f"{n} {t / 1e6:.2f} + {f / 1e6:.2f}" for n, (t, f) in summary["parameters"].items())
        flops = f"{summary['step_flops_per_image'] / 1e9:,.0f}"
        networks.add_row(part, "\n".join(texts), str(summary["batch_size"]), f"{summary['steps']:,}", flops)
    console.print(networks)
    forward = ", ".join(f"{name} {flops / 1e9:,.0f}" for name, flops in found["forward_flops_per_image"].items())
    console.print(f"forward pass, GFLOP per image: {forward}", highlight=False)
    console.print(_memory_table(found))
    console.print(
        "Stages and rivals are counted with the adversarial loss on and frozen networks in the loop; the generator "
        "reads cached latents. img/s and hours follow from the assumed share of the peak; nothing here was measured."
        + found["counted_size"],
        highlight=False,
    )


def _memory_table(found: dict[str, Any]) -> Table:
    gpu = found["gpu"]
    table = Table(title=f"PREDICTED on {gpu} at {found['mfu']:.0%} of its peak; memory in GB per GPU")
    columns = "part GPUs parallel checkpointing micro-batch weights grads optimizer EMA activations total fits"
    for name in (*columns.split(), "GB sent per step", "img/s", "hours"):
        left = name in ("part", "parallel", "checkpointing")
        table.add_column(name, justify="left" if left else "right")
    sizes = ("weights", "gradients", "optimizer", "averages", "activations", "total")
    for row in found["rows"]:
        micro = f"{row['micro_batch']}" + (f" x {row['accumulate']}" if row["accumulate"] > 1 else "")
        table.add_row(
            *(str(row[name]) for name in ("part", "gpus", "parallel", "checkpointing")),
            micro,
            *(f"{row[name] / 1e9:.1f}" for name in sizes),
            "yes" if row["fits"] else "no",
            *(f"{row['sent'] / 1e9:.2f}", f"{row['images_per_second']:,.0f}", f"{row['hours']:,.1f}"),
        )
    return table


def print_plan(recipe: Recipe, options: PlanConfig) -> None:
    """`aligntok plan`: count, print, and write JSON where asked to."""
    if options.all or options.measured is not None:
        given = "--all" if options.all else f"--measured {options.measured}"
        raise UserError(f"{given} belongs to the ledger of a step: give --step too")
    console = Console()
    with console.status("counting") as status:

        def update(done: int, total: int, what: str) -> None:
            status.update(f"counting {done + 1} of {total}: {what}")

        found = plan(recipe, options, tuple(options.parts or parts_of(recipe)), update)
    show(found, console if console.is_terminal else Console(width=200))
    if options.json is not None:
        write_bytes(Path(options.json), json.dumps(found, indent=1).encode())


def dry_run(recipe: Recipe, parts: tuple[str, ...]) -> dict[str, Any]:
    """Build the full-size networks of some parts on the meta device, take a step of each, print the plan.

    For the processes of torchrun, or 8 where it did not start this one. Nothing is downloaded, read or written.

    Raises:
        UserError: whatever does not fit together.
    """
    if "generator" in parts:
        check_buckets(recipe)
    else:
        refuse_buckets(recipe.data, "a rival" if "rival" in parts else "a tokenizer")
    options = PlanConfig(gpus=[int(os.environ.get("WORLD_SIZE", "8"))])
    found = plan(recipe, options, parts)
    show(found, Console(width=200))
    print(
        "dry run: the networks were built at full size, every phase took a step on the meta device, nothing was written"
    )
    return found
