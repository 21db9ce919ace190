"""Reading the results of a run: title, sentence and numbers at the head of its page, commands at its end.

Every text is made from what `results` holds; what it lacks is left out of the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aligntok.report.plots import TOKENIZER_PARTS, duration, name_of

Results = Mapping[str, Any]


def table(results: Results, name: str) -> Mapping[str, Any]:
    """One of the nested tables, empty where the run has none."""
    return results.get(name) or {}


def setting(results: Results, path: str) -> Any:
    """The value at a dotted path of the configuration, or None."""
    value: Any = results.get("config")
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def label(results: Results, part: str) -> str:
    """A part's name; Stage 2 carries its semantic weight once there is a branch without it."""
    weight = setting(results, "tokenizer.stages.stage2.semantic.weight")
    if part == "stage2" and weight is not None and "stage2_w_sp_0" in table(results, "reconstruction"):
        return f"Stage 2, w_sp = {weight:g}"
    return name_of(part)


def psnr(results: Results, part: str) -> float | None:
    """PSNR in dB of the reconstructions after a part."""
    metrics = table(results, "reconstruction").get(part) or {}
    return next((value for name, value in metrics.items() if name.startswith("PSNR")), None)


def last_stage(results: Results) -> str | None:
    """The last stage with a PSNR."""
    stages = [part for part in TOKENIZER_PARTS if psnr(results, part) is not None]
    return stages[-1] if stages else None


def shown_pictures(results: Results) -> str:
    """What the reconstructions are of: a run that held no pictures out must not claim that it did."""
    return "training" if table(results, "dataset").get("held_out") == 0 else "held-out"


def title(results: Results) -> str:
    """The page's title: the images it is about."""
    name = table(results, "dataset").get("name")
    return f"AlignTok on {name}" if name else "AlignTok"


def summary(results: Results) -> str:
    """One sentence: what became what, how well, in what time."""
    name, encoder = setting(results, "tokenizer.model.encoder.name"), results.get("encoder")
    if not encoder:
        encoder = f"the pretrained encoder `{name}`" if name else "a pretrained vision encoder"
    times = table(results, "times")
    text = f"In {duration(sum(times.values()))}, three" if times else "Three"
    text += f" stages turned {encoder} into an image tokenizer"
    stage = last_stage(results)
    if stage is not None:
        quality = f"{psnr(results, stage):.1f}\N{NO-BREAK SPACE}dB"
        text += f" that reconstructs {shown_pictures(results)} pictures at {quality}"
    if table(results, "generation"):
        text += ", and a LightningDiT learned to draw new ones from its latents"
    return text + "."


def headline(results: Results) -> list[tuple[str, str, str]]:
    """The numbers at the top, as (value, unit, what it is): PSNR, linear probe, feature distance, time."""
    numbers = []
    stage = last_stage(results)
    if stage is not None:
        what = f"PSNR of reconstructed {shown_pictures(results)} pictures after {name_of(stage)}"
        numbers.append((f"{psnr(results, stage):.1f}", "dB", what))
    probe = table(results, "probe")
    if "stage2" in probe:
        what = "linear-probe accuracy of the latents"
        if "encoder" in probe:
            what += f"; the encoder's own features reach {probe['encoder']['mean']:.3f}"
        numbers.append((f"{probe['stage2']['mean']:.3f}", "", what))
    for guidance, metrics in list(table(results, "generation").items())[-1:]:
        for name, value in list(metrics.items())[:1]:
            numbers.append((f"{value:.1f}", "", f"{name} of the samples, {guidance}; smaller is better"))
    times = table(results, "times")
    if times:
        numbers.append((duration(sum(times.values())), "", f"from images to this page{_on_device(results)}"))
    return numbers


def _on_device(results: Results) -> str:
    machine = {name.lower(): value for name, value in table(results, "machine").items()}
    if machine.get("device") == "cpu" and "threads" in machine:
        return f" on {machine['threads']} CPU threads"
    return f" on {machine['device']}" if "device" in machine else ""


def next_commands(results: Results) -> list[tuple[str, str]]:
    """What to try next, as (what it is for, command); the commands name this run's own folders."""
    output = setting(results, "output") or "runs/quickstart"
    size = setting(results, "data.image_size") or 64
    tokenizer = f"--tokenizer {output}/tokenizer"
    commands = [
        ("More samples", f"aligntok sample --generator {output}/generator {tokenizer} --guidance 3 --seed 1"),
        (
            "Your pictures there and back",
            f"aligntok reconstruct {tokenizer} --images FOLDER --image_size {size}",
        ),
        ("All of it on your own images", "aligntok quickstart --data FOLDER --output runs/mine"),
    ]
    if "stage2_w_sp_0" not in table(results, "reconstruction"):
        commands.append(("The price of meaning", "aligntok quickstart --ablation"))
    recipe = "aligntok train-tokenizer --config imagenet256_f16d32 --data.path FOLDER"
    return [*commands, ("The full recipe, on a GPU", recipe), ("What runs here, and why", "aligntok doctor")]
