"""What a step asks of the host: kernels launched, and how often it waits for the GPU.

    python -m benchmarks.step_counts [--recipes NAME ...]          (a section of the hardware report, too)

A training step and a guided sampler step of each recipe's generator are recorded on the meta device, as `aligntok plan
--step` does it: every operator with the launches that PyTorch's CUDA code makes of it, and those of our kernels. A wait
is a number that the host reads before it goes on; tests/training/test_faked_cuda.py counts those of whole runs, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aligntok.commands.plan import generator_alone, latent_shape
from aligntok.config import Recipe, SamplerConfig
from aligntok.config.from_dict import from_dict
from aligntok.config.recipes import read_recipe, recipe_path
from aligntok.diffusion.condition import Condition
from aligntok.diffusion.sampler import integrate
from aligntok.kernels import use_implementation
from aligntok.kernels._triton import record_launches
from aligntok.training.monitoring import meta_device
from aligntok.training.monitoring.ledger.assumptions import GPUS, Assumptions
from aligntok.training.monitoring.ledger.record import Recorder, Step, record
from aligntok.training.monitoring.ledger.variants import (
    COMPILED_REFERENCE,
    FUSED,
    FUSED_COMPILED,
    REFERENCE,
    Setting,
    variants,
)
from aligntok.training.monitoring.meta_device import Built, MetaPrecision

RECIPES = ("imagenet256_f16d32", "t2i_2b_256")
GPU = GPUS["h100-sxm"]
ROWS = 8  # images: launches do not depend on them
Recording = Callable[[Built, str, int], Step]  # an objective, implementation of our operators, architecture
SHOWN = (REFERENCE, COMPILED_REFERENCE, FUSED, FUSED_COMPILED)


def rows_of(name: str) -> list[dict[str, Any]]:
    """A recipe's training step and its sampler step: launches by variant, and waits."""
    recipe: Recipe = from_dict(Recipe, read_recipe(recipe_path(name)))
    build = partial(meta_device.build_generator, generator_alone(recipe), latent_shape(recipe), ROWS, "none")
    recorders: dict[str, Recording] = {"training": record, "sampling, guided": _sampler_step}
    found = []
    for what, recorder in recorders.items():
        reference, fused = (_recorded(build, recorder, way) for way in ("reference", "auto"))
        counted = {one.name: one for one in variants(reference, fused, Setting(GPU, Assumptions()))}
        launches = {name: sum(call.launches for call in counted[name].calls) for name in SHOWN}
        waits = sum(call.sync for call in counted[FUSED].calls)
        found.append({"recipe": name, "step": what, "launches": launches, "waits": waits})
    return found


def _recorded(build: Callable[[], Built], recorder: Recording, implementation: str) -> Step:
    return meta_device.count("cuda", build, lambda built: recorder(built, implementation, GPU.architecture))


def _sampler_step(built: Built, implementation: str, architecture: int) -> Step:
    """One Euler step with guidance; inside `meta_device.on_meta`."""
    (model,) = built.parts.values()
    batch = built.batch
    given = (batch["labels"],) if "text" not in batch else (batch["text"], batch["text_lengths"])
    condition, noise = Condition(given, given), batch["latents"]
    with record_launches(architecture) as launches:
        recorder = Recorder(model.parameters(), launches)
        with use_implementation(implementation), MetaPrecision("bf16").autocast(), recorder:
            integrate(model.eval(), noise, condition, SamplerConfig(steps=1, guidance=2.0))
    return Step(tuple(recorder.calls), frozenset(), recorder.flops, 0, len(noise))


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The counts as Markdown."""
    lines = [
        "| recipe | step | " + " | ".join(f"launches, {name}" for name in SHOWN) + " | waits |",
        "|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for row in rows:
        counts = " | ".join(f"{row['launches'][name]:,}" for name in SHOWN)
        lines.append(f"| {row['recipe']} | {row['step']} | {counts} | {row['waits']} |")
    return lines


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="names or files of recipes")
    options = parser.parse_args()
    print("\n".join(table([row for name in options.recipes for row in rows_of(name)])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
