"""Peers' networks, written from the tensors of their checkpoints alone: names, shapes and what they compute.

A second implementation of LDM's autoencoder, LightningDiT and DiT^DH, in their layouts and their direction of time, for
the converters to agree with.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        spread = torch.Size(shape[1:]).numel()
        state[name] = 1 + 0.1 * value if len(shape) == 1 and "norm" in name else value / spread**0.5
    return state


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def conv(state: dict[str, Tensor], name: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


# LDM's autoencoder, in its own names


def ldm_shapes(base: int, multipliers: tuple[int, ...], blocks: int, d: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LDM's autoencoder with attention at the coarsest level."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def residual(name: str, a: int, b: int) -> None:
        add(f"{name}.norm1", a)
        add(f"{name}.conv1", b, a, 3, 3)
        add(f"{name}.norm2", b)
        add(f"{name}.conv2", b, b, 3, 3)
        if a != b:
            add(f"{name}.nin_shortcut", b, a, 1, 1)

    def attention(name: str, a: int) -> None:
        add(f"{name}.norm", a)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", a, a, 1, 1)

    def middle(side: str, a: int) -> None:
        residual(f"{side}.mid.block_1", a, a)
        attention(f"{side}.mid.attn_1", a)
        residual(f"{side}.mid.block_2", a, a)

    widths, last = [base * m for m in multipliers], len(multipliers) - 1
    add("encoder.conv_in", base, 3, 3, 3)
    width = base
    for level, following in enumerate(widths):
        for block in range(blocks):
            residual(f"encoder.down.{level}.block.{block}", width, following)
            width = following
            if level == last:
                attention(f"encoder.down.{level}.attn.{block}", width)
        if level < last:
            add(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    middle("encoder", width)
    add("encoder.norm_out", width)
    add("encoder.conv_out", 2 * d, width, 3, 3)
    add("quant_conv", 2 * d, 2 * d, 1, 1)
    add("post_quant_conv", d, d, 1, 1)
    add("decoder.conv_in", width, d, 3, 3)
    middle("decoder", width)
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            residual(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
            if level == last:
                attention(f"decoder.up.{level}.attn.{block}", width)
        if level:
            add(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    add("decoder.norm_out", width)
    add("decoder.conv_out", 3, width, 3, 3)
    return shapes


class LDM:
    """LDM's autoencoder as functions of a state dict in its names."""

    def __init__(self, state: dict[str, Tensor], levels: int, blocks: int) -> None:
        self.state, self.levels, self.blocks = state, levels, blocks

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def residual(self, name: str, x: Tensor) -> Tensor:
        h = conv(self.state, f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = conv(self.state, f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(self.state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.norm.weight" not in self.state:
            return x
        normed = self.norm(f"{name}.norm", x)
        q, k, v = (conv(self.state, f"{name}.{part}", normed).flatten(2) for part in "qkv")  # [B, C, N]
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / q.shape[1] ** 0.5, dim=2)
        return x + conv(self.state, f"{name}.proj_out", torch.einsum("bnm,bcm->bcn", weights, v).view_as(x))

    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.attention(f"{side}.mid.attn_1", self.residual(f"{side}.mid.block_1", x))
        return self.residual(f"{side}.mid.block_2", x)

    def moments(self, x: Tensor) -> Tensor:
        x = conv(self.state, "encoder.conv_in", x, padding=1)
        for level in range(self.levels):
            for block in range(self.blocks):
                x = self.residual(f"encoder.down.{level}.block.{block}", x)
                x = self.attention(f"encoder.down.{level}.attn.{block}", x)
            if level < self.levels - 1:
                x = conv(self.state, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return conv(self.state, "quant_conv", conv(self.state, "encoder.conv_out", x, padding=1))

    def decode(self, z: Tensor) -> Tensor:
        x = conv(self.state, "decoder.conv_in", conv(self.state, "post_quant_conv", z), padding=1)
        x = self.middle("decoder", x)
        for level in reversed(range(self.levels)):
            for block in range(self.blocks + 1):
                x = self.residual(f"decoder.up.{level}.block.{block}", x)
                x = self.attention(f"decoder.up.{level}.attn.{block}", x)
            if level:
                x = conv(
                    self.state,
                    f"decoder.up.{level}.upsample.conv",
                    x.repeat_interleave(2, 2).repeat_interleave(2, 3),
                    padding=1,
                )
        return conv(self.state, "decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


# LightningDiT and DiT^DH, in their own names and direction of time


def block_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    hidden = int(2 / 3 * 4 * width)
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.w12": (2 * hidden, width)}
    layers |= {"mlp.w3": (width, hidden), "adaLN_modulation.1": (6 * width, width)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{norm}.weight": (width,) for norm in ("norm1", "norm2")}
    for layer, shape in layers.items():
        shapes |= {f"{name}.{layer}.weight": shape, f"{name}.{layer}.bias": shape[:1]}
    return shapes


def common_shapes(width: int, final: int, d: int, classes: int, features: int) -> dict[str, tuple[int, ...]]:
    layers = {
        "t_embedder.mlp.0": (width, features),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (d, final),
    }
    layers |= {"final_layer.adaLN_modulation.1": (2 * final, final)}
    shapes: dict[str, tuple[int, ...]] = {"y_embedder.embedding_table.weight": (classes + 1, width)}
    shapes["final_layer.norm_final.weight"] = (final,)
    for layer, shape in layers.items():
        shapes |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    return shapes


def patch_shapes(name: str, width: int, d: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.proj.weight": (width, d, 1, 1), f"{name}.proj.bias": (width,)}


def sincos(side: int, width: int) -> Tensor:
    """The fixed table [1, side^2, width] of MAE and DiT: columns first, sines before cosines."""
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [p.flatten()[:, None] * omega for p in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def rotate(x: Tensor, side: int) -> Tensor:
    """2-D rotary positions on [B, H, N, D], as complex numbers: first half of D by row, second by column."""
    quarter = x.shape[-1] // 4
    omega = 1 / 10000 ** (torch.arange(quarter) / quarter)
    y, z = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([p.flatten()[:, None] * omega for p in (y, z)], dim=1)  # [N, D/2]
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def dit_block(state: dict[str, Tensor], name: str, x: Tensor, c: Tensor, heads: int, side: int) -> Tensor:
    """c: [B, 1, D] or [B, N, D]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = linear(state, f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, -1)
    y = rms(x, state[f"{name}.norm1.weight"]) * (1 + scale1) + shift1
    qkv = linear(state, f"{name}.attn.qkv", y).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, N, D]
    q, k = rotate(qkv[0], side), rotate(qkv[1], side)
    attended = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ qkv[2]
    x = x + gate1 * linear(state, f"{name}.attn.proj", attended.transpose(1, 2).flatten(2))
    y = rms(x, state[f"{name}.norm2.weight"]) * (1 + scale2) + shift2
    a, b = linear(state, f"{name}.mlp.w12", y).chunk(2, -1)
    return x + gate2 * linear(state, f"{name}.mlp.w3", F.silu(a) * b)


def dit_final(state: dict[str, Tensor], x: Tensor, c: Tensor, side: int) -> Tensor:
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, -1)
    x = linear(state, "final_layer.linear", rms(x, state["final_layer.norm_final.weight"]) * (1 + scale) + shift)
    return x.transpose(1, 2).unflatten(2, (side, side))


def tokens(state: dict[str, Tensor], name: str, z: Tensor) -> Tensor:
    return conv(state, f"{name}.proj", z).flatten(2).transpose(1, 2)


def time_mlp(state: dict[str, Tensor], features: Tensor) -> Tensor:
    return linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", features)))


def lightningdit(state: dict[str, Tensor], z: Tensor, t: Tensor, labels: Tensor, heads: int) -> Tensor:
    """Their velocity, data - noise, at their time, 0 = noise."""
    side = z.shape[-1]
    angle = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    c = time_mlp(state, torch.cat([angle.cos(), angle.sin()], 1)) + state["y_embedder.embedding_table.weight"][labels]
    x = tokens(state, "x_embedder", z) + state["pos_embed"]
    for index in range(sum(".attn.proj.weight" in name for name in state)):
        x = dit_block(state, f"blocks.{index}", x, c[:, None], heads, side)
    return dit_final(state, x, c[:, None], side)


def ditdh(state: dict[str, Tensor], z: Tensor, t: Tensor, labels: Tensor, depth: int, heads: tuple[int, int]) -> Tensor:
    """Velocity noise - data at time t, 1 = noise."""
    side = z.shape[-1]
    angle = 2 * torch.pi * t[:, None] * state["t_embedder.W"]
    time = time_mlp(state, torch.cat([angle.sin(), angle.cos()], 1))
    c = F.silu(time + state["y_embedder.embedding_table.weight"][labels])
    s = tokens(state, "s_embedder", z) + state["pos_embed"]
    blocks = sum(".attn.proj.weight" in name for name in state)
    for index in range(depth):
        s = dit_block(state, f"blocks.{index}", s, c[:, None], heads[0], side)
    s = linear(state, "s_projector", F.silu(time[:, None] + s))
    x = tokens(state, "x_embedder", z)
    for index in range(depth, blocks):
        x = dit_block(state, f"blocks.{index}", x, s, heads[1], side)
    return dit_final(state, x, s, side)
