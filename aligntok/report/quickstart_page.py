"""The page of `aligntok quickstart`, in the order in which a newcomer asks.

What came out, how it looks, what it kept, what it cost, what to do next. `build_page` only arranges: every
number comes from `results`, every curve from `records`, and what is missing there is left out. A data set
without classes has the one class "all".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from aligntok.errors import UserError
from aligntok.report import findings, plots
from aligntok.report import pictures as pics
from aligntok.report.findings import Results
from aligntok.report.markup import Better
from aligntok.report.page import Page, Row

SIZE_LIMIT = 3_800_000  # bytes of HTML: a mail attachment, a quick load; pictures shrink until the page is below it
PICTURE_SIDES = (128, 96, 64, 48, 32)  # pixels of the longer side, tried in this order
COLUMNS = 10  # pictures per row of a comparison: about 90 CSS pixels each on a desktop screen
SAMPLES = 8  # samples per class and line
CLASSES = 24  # classes shown; more are counted in the heading
UNCLASSED = 64  # samples shown where there is one class only

COMPARED = ("originals", "stage1", "stage2", "stage3", "stage2_w_sp_0")
SAMPLED = ("samples_guided", "samples")
MAPS = {"encoder_tokens": "encoder", "latents_stage1": "stage1", "latents_stage2": "stage2"}
HIGHER_IS_BETTER = ("PSNR", "SSIM")  # every other metric is a distance

RECONSTRUCTIONS = (
    "Stage 1 decodes what the frozen encoder sees, which is content more than colour. Stage 2 lets the "
    "encoder take up what is missing and holds the latents to their meaning. Stage 3 trains the decoder "
    "alone."
)
KEPT = (
    "The three strongest directions of each space as red, green and blue, one square per token. Where a row "
    "keeps the pattern of the encoder's features, the latents still tell the same things apart."
)
TRADE_OFF = (
    "A linear classifier on the average-pooled latents says how much meaning they hold, PSNR how much of the "
    "picture. Stage 2 trades one for the other, and its weight `w_sp` sets the price: at 0 nothing holds the "
    "latents to the encoder."
)
LATENTS: dict[bool | None, str] = {
    True: "Stage 3 did not move the latents, not by a bit.",
    False: "Stage 3 moved the latents, which it never should: please report this run.",
}

Pictures = Mapping[str, Tensor]
Records = Sequence[Mapping[str, Any]]


def build_page(results: Results, pictures: Pictures, records: Records) -> Page:
    """Arrange the results of a run as a page below `SIZE_LIMIT`.

    Args:
        results: what the run measured: "machine", "dataset", "config" (facts), "times" (seconds per part),
            "reconstruction" (part -> metrics), "probe" (part -> mean and std), "generation" (guidance ->
            metrics), "protocols", "classes", "prompts" (of text to image), "skipped_images", "command",
            "latents_unchanged", "encoder" (what it is called).
        pictures: "originals", "stage1", "stage2", "stage3", "stage2_w_sp_0" [n, 3, H, W]; "samples" and
            "samples_guided" [classes * k, 3, H, W] class by class; "encoder_tokens" [n, h*w, C];
            "latents_stage1" and "latents_stage2" [n, d, h, w].
        records: training records, see `plots.loss_curves`. Any part of the three may be missing.

    Raises:
        UserError: pictures of the wrong shape, with NaN, or of different counts.
    """
    _check(results, pictures)
    for side in PICTURE_SIDES:
        page = _compose(results, pictures, records, side)
        if len(page.html().encode()) <= SIZE_LIMIT:
            break
    return page


def _compose(results: Results, pictures: Pictures, records: Records, side: int) -> Page:
    page = Page(findings.title(results), findings.summary(results))
    page.headline(findings.headline(results))
    _samples(page, results, pictures, side)
    _reconstructions(page, results, pictures, side)
    _kept(page, pictures, side)
    _trade_off(page, results, pictures, side)
    _curves(page, records)
    _metrics(page, results)
    _costs(page, results)
    _data(page, results)
    page.section("What to do next")
    page.commands(findings.next_commands(results))
    return page


def _check(results: Results, pictures: Pictures) -> None:
    """Refuse pictures that do not belong together before anything is drawn."""
    for name in COMPARED:
        if name in pictures:
            pics.check_images(pictures[name], name)
    counts = {name: len(pictures[name]) for name in (*COMPARED, *MAPS) if name in pictures}
    if len(set(counts.values())) > 1:
        raise UserError(f"page: pictures of different counts {counts}; the rows must show the same images")
    for name in SAMPLED:
        if name in pictures:
            pics.by_class(pictures[name], _asked(results))


def _asked(results: Results) -> list[str]:
    """What samples are of: captions, or classes."""
    return list(results.get("prompts") or results.get("classes") or ["all"])


def _strip(label: str, images: Tensor, side: int, pixelated: bool = False) -> Row:
    return Row(label, pics.strip(pics.preview(images, side)), len(images), pixelated)


def _samples(page: Page, results: Results, pictures: Pictures, side: int) -> None:
    shown = [name for name in SAMPLED if name in pictures]
    if not shown:
        return
    classes, prompts = _asked(results), results.get("prompts")
    told = "is told a class and turns noise" if len(classes) > 1 else "turns noise"
    told = "reads a caption and turns noise" if prompts else told
    text = f"The generator {told} into a grid of latents; the tokenizer's decoder makes a picture of them."
    page.section("Samples", text)
    guided = next((name for name in findings.table(results, "generation") if name != "no guidance"), "guidance")
    for name in shown:
        heading = f"With {guided}" if name == "samples_guided" else "Without guidance"
        if len(classes) > CLASSES:
            heading += f", the first {CLASSES} of {len(classes)} {'captions' if prompts else 'classes'}"
        elif len(shown) == 1 and name == "samples":
            heading = ""  # no other row to tell it from
        rows = pics.by_class(pictures[name], classes)[:CLASSES]
        if len(classes) == 1:
            cells = [_strip("", line, side) for line in rows[0][:UNCLASSED].split(SAMPLES)]
        else:
            cells = [_strip(classes[i], row[:SAMPLES], side) for i, row in enumerate(rows)]
        page.cells(cells, heading)


def _reconstructions(page: Page, results: Results, pictures: Pictures, side: int) -> None:
    stages = [part for part in plots.TOKENIZER_PARTS if part in pictures]
    if "originals" not in pictures or not stages:
        return
    unseen = findings.shown_pictures(results) == "held-out"
    what = "Pictures that no stage was trained on" if unseen else "Training pictures (none was held out)"
    page.section("Reconstructions", f"{what}, encoded and decoded. {RECONSTRUCTIONS}")
    rows = [_strip("Original", pictures["originals"][:COLUMNS], side)]
    for part in stages:
        psnr = findings.psnr(results, part)
        label = plots.name_of(part) + (f" · {psnr:.1f} dB" if psnr is not None else "")
        rows.append(_strip(label, pictures[part][:COLUMNS], side))
    page.rows(rows, LATENTS.get(results.get("latents_unchanged"), ""))


def _kept(page: Page, pictures: Pictures, side: int) -> None:
    """Principal components as colours; later spaces are turned to agree with the first as far as they can."""
    present = [name for name in MAPS if name in pictures]
    if not present or "originals" not in pictures:
        return
    originals = pics.preview(pictures["originals"][:COLUMNS], side)
    height, width = originals.shape[-2:]
    grid = _grid(pictures)
    rows, reference = [_strip("Original", originals, side)], None
    for name in present:
        tokens = pictures[name] if name == "encoder_tokens" else pics.latent_tokens(pictures[name])
        colors = pics.pca_colors(tokens, grid, reference)
        reference = colors if reference is None else reference
        what = "Encoder features" if name == "encoder_tokens" else f"Latents, {plots.name_of(MAPS[name])}"
        rows.append(_strip(what, pics.upscale(colors[:COLUMNS], (height, width)), side, pixelated=True))
    page.section("What the tokenizer keeps", KEPT)
    page.rows(
        rows,
        f"{grid[0]} × {grid[1]} tokens per picture. Principal components over all {len(tokens)} pictures; "
        "each later row is rotated to agree with the first as far as it can, so colours may be compared down "
        "a column.",
    )


def _grid(pictures: Pictures) -> tuple[int, int]:
    """Height and width of the token grid: that of the latents, or a square where there are only tokens."""
    for name in MAPS:
        if name != "encoder_tokens" and name in pictures:
            height, width = pictures[name].shape[-2:]
            return height, width
    edge = round(pictures["encoder_tokens"].shape[1] ** 0.5)
    return edge, edge


def _trade_off(page: Page, results: Results, pictures: Pictures, side: int) -> None:
    probe = findings.table(results, "probe")
    parts = [part for part in ("encoder", "stage1", "stage2", "stage2_w_sp_0") if part in probe]
    if not parts:
        return
    page.section("Meaning against detail", TRADE_OFF, columns=2)
    names = {p: findings.label(results, p) for p in parts}
    psnr = {p: findings.psnr(results, p) for p in parts}
    page.table(
        ["", "linear probe", "PSNR [dB]"],
        [[names[p], (probe[p]["mean"], probe[p]["std"]), psnr[p]] for p in parts],
        "Mean and standard deviation over folds.",
        {"linear probe": "max", "PSNR [dB]": "max"},
        reference_rows=int("encoder" in parts),
    )
    points = [
        plots.Point(names[p], value, probe[p]["mean"], probe[p]["std"], plots.COLORS[p])
        for p, value in psnr.items()
        if value is not None
    ]
    if points:
        page.plot(plots.trade_off(points, probe["encoder"]["mean"] if "encoder" in probe else None))
    if {"originals", "stage2", "stage2_w_sp_0"} <= pictures.keys():
        shown = {"originals": "Original", "stage2": findings.label(results, "stage2")}
        shown["stage2_w_sp_0"] = plots.name_of("stage2_w_sp_0")
        page.rows([_strip(label, pictures[name][:COLUMNS], side) for name, label in shown.items()])


def _curves(page: Page, records: Records) -> None:
    curves = plots.loss_curves(records)
    if not curves:
        return
    text = "Faint: as logged. Strong: a moving average. The stages follow one another."
    if any(record["part"] == "stage2_w_sp_0" for record in records):
        text += " Dashed: Stage 2 with `w_sp` = 0, for the comparison above."
    page.section("Training", text, columns=3)
    for plot in curves:
        page.plot(plot)


def _metrics(page: Page, results: Results) -> None:
    reconstruction, generation = (
        findings.table(results, "reconstruction"),
        findings.table(results, "generation"),
    )
    if not reconstruction and not generation:
        return
    page.section("Metrics", "Feature distances carry the name of their feature extractor; they are not FID.")
    _metric_table(page, "Reconstruction", reconstruction, lambda part: findings.label(results, part))
    _metric_table(page, "Generation", generation, lambda name: name[:1].upper() + name[1:])
    protocols = findings.table(results, "protocols")
    if protocols:
        page.notes({name.capitalize(): text for name, text in protocols.items()})


def _metric_table(
    page: Page, name: str, metrics: Mapping[str, Mapping[str, float]], label: Callable[[str], str]
) -> None:
    if not metrics:
        return
    headers = list(dict.fromkeys(header for values in metrics.values() for header in values))
    better: dict[str, Better] = {header: "max" if header.startswith(HIGHER_IS_BETTER) else "min" for header in headers}
    rows = [[label(part), *(values.get(header) for header in headers)] for part, values in metrics.items()]
    page.table([name, *headers], rows, "", better)


def _costs(page: Page, results: Results) -> None:
    times, machine = findings.table(results, "times"), findings.table(results, "machine")
    if not times and not machine:
        return
    page.section("Time and machine", columns=2)
    if times:
        page.plot(plots.time_bars(times), f"{plots.duration(sum(times.values()))} in all.")
    if machine:
        page.facts({name[:1].upper() + name[1:]: value for name, value in machine.items()})


def _data(page: Page, results: Results) -> None:
    skipped, classes = results.get("skipped_images") or [], results.get("classes") or []
    facts = {key.replace("_", " ").capitalize(): v for key, v in findings.table(results, "dataset").items()}
    facts |= {"Classes": len(classes)} if len(classes) > 1 else {}
    facts |= {"Skipped images": len(skipped)} if skipped else {}
    facts |= {"Command": results["command"]} if results.get("command") else {}
    config = findings.table(results, "config")
    if not facts and not config:
        return
    page.section("Data and configuration")
    page.facts(facts)
    if skipped:
        page.details(f"Images that could not be read: {len(skipped)}", "\n".join(map(str, skipped)))
    if config:
        page.details("Every value of the configuration", "\n".join(_dotted(config)))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as `a.b.c: value` lines."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += _dotted(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {value}")
    return lines
