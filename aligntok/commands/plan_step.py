"""`aligntok plan --step`: the ledger of one training step, for each part and each number of GPUs.

The step is recorded on the meta device twice, with our operators and with the PyTorch references, and priced in every
way in which it can run (aligntok.training.monitoring.ledger). Everything that it prints is a prediction.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aligntok import kernels
from aligntok.commands.plan import (
    PlanConfig,
    Update,
    check,
    generator_alone,
    latent_shape,
    modes,
    parts_of,
    precision_of,
    rows_at_once,
    stage_alone,
)
from aligntok.config import Recipe, TrainingConfig
from aligntok.errors import UserError
from aligntok.runtime.files import write_bytes
from aligntok.training.monitoring import meta_device
from aligntok.training.monitoring.ledger import measured, sums
from aligntok.training.monitoring.ledger.assumptions import GPUS, Assumptions, Gpu
from aligntok.training.monitoring.ledger.levers import levers
from aligntok.training.monitoring.ledger.measured import Measured
from aligntok.training.monitoring.ledger.record import Step, record
from aligntok.training.monitoring.ledger.sums import Line
from aligntok.training.monitoring.ledger.variants import FUSED, Setting, Variant, variants
from aligntok.training.monitoring.meta_device import Built

TOP = 12  # lines that are printed without --all
MARK = "PREDICTED"


def step_plan(
    recipe: Recipe, options: PlanConfig, parts: tuple[str, ...], update: Update | None = None
) -> dict[str, Any]:
    """The ledgers of some of a recipe's parts, as plain data; milliseconds where a name says so.

    Args:
        recipe: everything about the training.
        options: for which GPU and how many of them; where measured numbers are.
        parts: stages or the generator; stages without steps are left out.
        update: called with (ledgers done, ledgers in all, what comes next).

    Raises:
        UserError: networks that do not fit together, a batch that cannot be divided, an option out of range, a rival, a
            file of measurements that is none.
    """
    check(recipe, options, parts)
    if "rival" in parts:
        raise UserError("--step knows the stages and the generator, not rivals: give --parts generator, or no --step")
    gpu, assumed, known = GPUS[options.gpu], Assumptions(), None
    if options.measured is not None:
        known = measured.read(options.measured, gpu, assumed)
        assumed = known.assumed
    jobs = [(p, mode, gpus) for p in parts for mode in modes(recipe, p, every=False) for gpus in options.gpus]
    found = _head(options, gpu, assumed, known)
    for done, (part, mode, gpus) in enumerate(jobs):
        if update is not None:
            update(done, len(jobs), f"a step of {part} on {gpus} {options.gpu}")
        found["ledgers"].append(_ledger(recipe, part, mode, Setting(gpu, assumed, gpus)))
    if update is not None:
        update(len(jobs), len(jobs), "")
    return found


def _head(options: PlanConfig, gpu: Gpu, assumed: Assumptions, known: Measured | None) -> dict[str, Any]:
    found: dict[str, Any] = {"prediction": True, "gpu": options.gpu, "data_sheet": dataclasses.asdict(gpu)}
    found |= {"assumptions": assumed.rows(), "measured": None, "ledgers": []}
    found["without_triton"] = kernels.explain("adaln", "cuda").rejected.get("triton")
    if known is not None:
        found["measured"] = {"file": known.file, "device": known.device, "steps": known.steps, "missing": known.missing}
    return found


def _ledger(recipe: Recipe, part: str, mode: str, setting: Setting) -> dict[str, Any]:
    """The ledger of one part on a number of GPUs."""
    training: TrainingConfig = (recipe.generator if part == "generator" else recipe.tokenizer).training
    rows = rows_at_once(training, setting.gpus)
    setting = dataclasses.replace(
        setting,
        precision=precision_of(training),
        accumulate=training.accumulate,
        sharded=training.parallel == "fsdp" and setting.gpus > 1,
    )
    record_as = partial(_recorded, _builder(recipe, part, mode, rows), setting.gpu)
    reference, fused = record_as("reference"), record_as("auto")
    found = variants(reference, fused, setting)
    images = rows * setting.accumulate * setting.gpus
    flops = fused.flops * setting.accumulate * setting.gpus
    peak = setting.gpus * setting.gpu.peak[setting.precision]
    data: dict[str, Any] = {"part": part, "gpus": setting.gpus, "micro_batch": rows, "accumulate": setting.accumulate}
    data |= {"images": images, "checkpointing": mode, "precision": setting.precision, "flops": flops}
    data["parallel"] = "-" if setting.gpus == 1 else "fsdp" if setting.sharded else "ddp"
    data["variants"] = [_variant(one, images, flops / one.seconds / peak) for one in found]
    listed = levers(found, fused, setting)
    data["levers"] = [{"lever": x.name, "ms_saved": _ms(x.saved), "taken": x.taken, "rounds": x.rounds} for x in listed]
    return data


def _builder(recipe: Recipe, part: str, mode: str, rows: int) -> Callable[[], Built]:
    if part == "generator":
        return partial(meta_device.build_generator, generator_alone(recipe), latent_shape(recipe), rows, mode)
    config, stage = stage_alone(recipe, part)
    return partial(meta_device.build_stage, config, stage, recipe.data.image_size, rows, looked_up=False, mode=mode)


def _recorded(build: Callable[[], Built], gpu: Gpu, implementation: str) -> Step:
    architecture = gpu.architecture
    return meta_device.count("cuda", build, lambda built: record(built, implementation, architecture))


def _variant(variant: Variant, images: int, mfu: float) -> dict[str, Any]:
    data: dict[str, Any] = {"variant": variant.name, "launches": sum(call.launches for call in variant.calls)}
    data |= {"device_ms": _ms(variant.device), "host_ms": _ms(variant.host), "exposed_ms": _ms(variant.exposed)}
    data |= {"step_ms": _ms(variant.seconds), "images_per_second": images / variant.seconds, "mfu": mfu}
    data["bytes"] = sum(call.bytes for call in variant.calls)
    data["bound_ms"] = {name: _ms(seconds) for name, seconds in sums.bounds(variant).items()}
    data["groups"] = {name: _line(line) for name, line in sums.groups(variant).items()}
    data["lines"] = [_line(line) for line in sums.lines(variant)]
    return data


def _line(line: Line) -> dict[str, Any]:
    data: dict[str, Any] = {"op": line.op, "shapes": line.shapes, "phase": line.phase, "group": line.group}
    data |= {"calls": line.calls, "launches": line.launches, "flops": line.flops, "bytes": line.bytes}
    return data | {"device_ms": _ms(line.device), "host_ms": _ms(line.host), "bound": line.bound}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def show(found: dict[str, Any], console: Console, every: bool) -> None:
    """Print ledgers as tables.

    Args:
        every: all lines instead of the TOP longest.
    """
    for ledger in found["ledgers"]:
        _show_ledger(ledger, found["gpu"], console, every)
    console.print(_assumptions_table(found))
    say = partial(console.print, highlight=False)
    if (known := found["measured"]) is not None:
        say(f"Measured, from {known['file']} ({known['device']}); everything above stays a prediction made with it.")
        for line in known["steps"]:
            say(f"Measured there: {line} (forward, backward and fused AdamW; no clip, no moving average).")
        say(f"Not in the file, so still assumed: {', '.join(known['missing'])}.")
    if found["without_triton"] is not None:
        say(f"Our Triton operators are not counted as such: {found['without_triton']}.")
    say(
        "Every time, rate and share above is PREDICTED, none was measured. FLOPs are those of `aligntok plan`; bytes "
        "are what operators read and write if nothing stays in a cache. Compiled: pointwise operators and reductions "
        "over the last dimension that lie between two products or fused operators and hand tensors to each other are "
        "one kernel, in the whole forward and backward pass. The host runs ahead of the device; a step lasts until "
        "both are done. Levers are priced one at a time on `fused eager` and do not add up. MFU is against the dense "
        "peak of the run's precision, for fp8 too."
    )


def _show_ledger(ledger: dict[str, Any], gpu: str, console: Console, every: bool) -> None:
    several = f" x {ledger['accumulate']}" if ledger["accumulate"] > 1 else ""
    where = f"{ledger['gpus']} x {gpu}" + (f", {ledger['parallel']}" if ledger["gpus"] > 1 else "")
    batch = f"{ledger['micro_batch']}{several} images on each, {ledger['precision']}"
    console.print(f"\n{ledger['part']}: {MARK} ledger of one step on {where}, {batch}", highlight=False, style="bold")
    by_name = {variant["variant"]: variant for variant in ledger["variants"]}
    console.print(_groups_table(by_name), _variants_table(ledger), _lines_table(by_name[FUSED], every))
    levers_table = Table(title=f"levers, {MARK} ms saved of {by_name[FUSED]['step_ms']:.1f} ms, each alone")
    levers_table.add_column("ms saved", justify="right")
    levers_table.add_column("lever")
    levers_table.add_column("remark")
    for lever in ledger["levers"]:
        remark = "what a GPU runs already" if lever["taken"] else "rounds otherwise" if lever["rounds"] else ""
        levers_table.add_row(f"{lever['ms_saved']:.1f}", lever["lever"], remark)
    console.print(levers_table)


def _groups_table(by_name: dict[str, dict[str, Any]]) -> Table:
    """Groups of operators: what they are in a step with our operators, and device time in every variant."""
    table = Table(title=f"{MARK} ms on the device; calls, launches, TFLOP, GB and bound are those of `{FUSED}`")
    table.add_column("group")
    for name in ("calls", "launches", "TFLOP", "GB", "host ms", "bound", *by_name):
        table.add_column(name, justify="left" if name == "bound" else "right")
    names = list(dict.fromkeys(name for variant in by_name.values() for name in variant["groups"]))
    for name in names:
        own = by_name[FUSED]["groups"].get(name)
        cells = ["", "", "", "", "", ""] if own is None else _cells(own)
        times = (variant["groups"].get(name) for variant in by_name.values())
        table.add_row(name, *cells, *("" if one is None else f"{one['device_ms']:.2f}" for one in times))
    return table


def _cells(line: dict[str, Any]) -> list[str]:
    flops = f"{line['flops'] / 1e12:.2f}" if line["flops"] else ""
    cells = [f"{line['calls']:,}", f"{line['launches']:,}", flops, f"{line['bytes'] / 1e9:.2f}"]
    return [*cells, f"{line['host_ms']:.2f}", line["bound"]]


def _variants_table(ledger: dict[str, Any]) -> Table:
    table = Table(title=f"{MARK} sums of a step")
    table.add_column("variant")
    for name in ("launches", "GB", "device ms", "bound by", "host ms", "exposed ms", "step ms", "img/s", "MFU"):
        table.add_column(name, justify="left" if name == "bound by" else "right")
    for one in ledger["variants"]:
        shares = (f"{name} {ms / one['device_ms']:.0%}" for name, ms in one["bound_ms"].items())
        times = (f"{one[name]:.1f}" for name in ("host_ms", "exposed_ms", "step_ms"))
        first = (one["variant"], f"{one['launches']:,}", f"{one['bytes'] / 1e9:,.0f}", f"{one['device_ms']:.1f}")
        table.add_row(*first, ", ".join(shares), *times, f"{one['images_per_second']:,.0f}", f"{one['mfu']:.1%}")
    return table


def _lines_table(variant: dict[str, Any], every: bool) -> Table:
    lines = variant["lines"] if every else variant["lines"][:TOP]
    which = "all lines" if every else f"the {len(lines)} longest of {len(variant['lines'])} lines (--all: all)"
    table = Table(title=f"{which} of `{variant['variant']}`, {MARK}")
    for name in ("operator", "inputs", "phase", "group"):
        table.add_column(name, overflow="fold")
    for name in ("calls", "launches", "TFLOP", "GB", "host ms", "bound", "ms"):
        table.add_column(name, justify="left" if name == "bound" else "right")
    for line in lines:
        names = (line[name] for name in ("op", "shapes", "phase", "group"))
        table.add_row(*names, *_cells(line), f"{line['device_ms']:.2f}")
    return table


def _assumptions_table(found: dict[str, Any]) -> Table:
    """The one place where everything that was taken for granted stands."""
    sheet = found["data_sheet"]
    table = Table(title=f"assumed for every number above; --measured FILE replaces them; GPU: {found['gpu']}")
    for name in ("name", "value", "unit", "source"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for name, rate in sheet["peak"].items():
        table.add_row(f"peak {name}", f"{rate / 1e12:g}", "TFLOP/s", sheet["source"])
    table.add_row("bandwidth", f"{sheet['bandwidth'] / 1e12:g}", "TB/s", sheet["source"])
    table.add_row("link", f"{sheet['link'] / 1e9:g}", "GB/s one way", sheet["source"])
    for row in found["assumptions"]:
        table.add_row(row["name"], f"{row['value']:.4g}", row["unit"], row["source"])
    return table


def print_step_plan(recipe: Recipe, options: PlanConfig) -> None:
    """`aligntok plan --step`: record, price, print, and write JSON where asked to."""
    console = Console()
    with console.status("recording") as status:

        def update(done: int, total: int, what: str) -> None:
            status.update(f"recording {done + 1} of {total}: {what}")

        found = step_plan(recipe, options, tuple(options.parts or parts_of(recipe)), update)
    show(found, console if console.is_terminal else Console(width=200), options.all)
    if options.json is not None:
        write_bytes(Path(options.json), json.dumps(found, indent=1).encode())
