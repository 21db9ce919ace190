"""DiT^DH checkpoints of bytetriper/RAE into generator folders.

RAE's code has our direction of time (t = 1 is noise, v = noise - data), so no weight changes. Its 50 grid points are
49 evaluations, at a time shift of sqrt(values of a latent / 4096); its published samples use no guidance or that of a
second, weaker network, which is not part of the checkpoint.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from aligntok.config import LightningDiTConfig, SamplerConfig
from aligntok.errors import UserError
from aligntok.models.dit_dh import DiTDH
from aligntok.models.generator import save_generator
from aligntok.runtime.published import read_published
from aligntok.zoo.converters.conversion import Report, fill, heads_of, renamed, require_shape, side_of
from aligntok.zoo.converters.lightningdit import RULES, tokenizer_fingerprint, trunk

WHAT = "DiT^DH"
IGNORED = {r"(enc|dec)_feat_rope\.": "tables of rotary positions, computed here"}
GRID_POINTS, SHIFT_BASE = 50, 4096  # configs: sampler.num_steps, misc.time_dist_shift_base
END = 0.001  # of the grid, before the shift (src/stage2/transport/transport.py)
HEAD_DEPTH = 2  # of every published network; what a head as wide as its trunk cannot tell


def convert(source: Path, output: Path, *, tokenizer: str | None = None) -> Report:
    """Write the generator folder `output` from the checkpoint `source`, its moving averages where it holds them.

    Raises:
        UserError: a file that cannot be read or does not fit; no tokenizer, or one of other latents.
    """
    state = read_published(source)
    fingerprint = tokenizer_fingerprint(tokenizer, require_shape(state, "s_embedder.proj.weight", source, WHAT, 4)[1])
    model = build(state, source)
    report = fill(model, state, lambda name: sources(name, len(model.blocks)), IGNORED, source, WHAT)
    side = model.latent_size[0]
    shift = (model.latent_channels * side * side / SHIFT_BASE) ** 0.5
    classes = [str(number) for number in range(model.null_class)]
    # RAE's guidance, where there is some, is on at all times: t_min 0, t_max 1
    settings = SamplerConfig(steps=GRID_POINTS - 1, time_shift=shift, end=END, guidance_interval=(0.0, 1.0))
    save_generator(output, model, model.state_dict(), settings, classes, fingerprint)
    report.notes.append("time direction and velocity sign are ours already; classes are called by their numbers")
    return report


def build(state: dict[str, Tensor], path: Path) -> DiTDH:
    """A network of the sizes that the tensors have."""
    width, channels, patch, _ = require_shape(state, "s_embedder.proj.weight", path, WHAT, 4)
    head_width = require_shape(state, "x_embedder.proj.weight", path, WHAT, 4)[0]
    widths = [value.numel() for name, value in state.items() if re.match(r"blocks\.\d+\.norm1\.weight", name)]
    head_depth = HEAD_DEPTH if head_width == width else widths.count(head_width)
    if not 0 < head_depth < len(widths):
        raise UserError(f"{path} is not a {WHAT}: of its {len(widths)} blocks {head_depth} are {head_width} wide")
    side = side_of(require_shape(state, "pos_embed", path, WHAT, 3)[1], path) * patch
    config = LightningDiTConfig(
        depth=len(widths) - head_depth,
        head_depth=head_depth,
        head_width=head_width,
        head_heads=heads_of(head_width, path),
        **trunk(state, path, WHAT, width, patch),
    )
    return DiTDH(config, channels, (side, side))


def sources(name: str, depth: int) -> list[str]:
    """RAE's name of one of our tensors; its head's blocks are numbered after the trunk's."""
    name = re.sub(r"^head_blocks\.(\d+)", lambda found: f"blocks.{depth + int(found[1])}", name)
    own = [
        (r"^patches\.", "s_embedder.proj."),
        (r"^head_patches\.", "x_embedder.proj."),
        (r"^project\.", "s_projector."),
        (r"^time\.frequencies$", "t_embedder.W"),
    ]
    return [renamed([*own, *RULES], name)]
