"""The FLUX transformer: sizes, parity with diffusers' FLUX.2, masks and padding, grids, compilation."""

import pytest
import torch
from torch import nn

from aligntok.config import FluxTransformerConfig
from aligntok.errors import UserError
from aligntok.models.blocks import prepare, restore
from aligntok.models.flux_transformer import GRIDS, FluxTransformer, axes_of, rope_pairs

TINY = FluxTransformerConfig(width=64, heads=2, double_blocks=1, single_blocks=2, pad_to=4)


def tiny(**options) -> FluxTransformer:
    """A small one with no weight at zero."""
    torch.manual_seed(0)
    model = FluxTransformer(FluxTransformerConfig(**{**vars(TINY), **options}), 4, (4, 4), 24)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.08)
    return model


def inputs(batch=2, tokens=8, side=4):
    generator = torch.Generator().manual_seed(1)
    z, text = (torch.randn(*shape, generator=generator) for shape in ((batch, 4, side, side), (batch, tokens, 24)))
    return z, torch.rand(batch, generator=generator), text, torch.tensor([3, tokens][:batch])


def count(config: FluxTransformerConfig, channels: int, text_width: int) -> tuple[int, int]:
    """(weights of matrix products, all others) on the meta device."""
    with torch.device("meta"):
        model = FluxTransformer(config, channels, (16, 16), text_width)
    sizes = [(p.numel(), p.ndim) for p in model.parameters()]
    return sum(n for n, dims in sizes if dims == 2), sum(n for n, dims in sizes if dims == 1)


@pytest.mark.parametrize(
    ("config", "channels", "text_width", "expected"),
    [
        (FluxTransformerConfig(), 32, 1024, 2_041_184_256),
        (FluxTransformerConfig(), 32, 4096, 2_047_475_712),  # with T5-XXL
        (FluxTransformerConfig(width=6144, heads=48, double_blocks=8, single_blocks=48), 128, 15360, 32.18e9),
        (FluxTransformerConfig(width=3072, heads=24, double_blocks=5, single_blocks=20), 128, 7680, 3.876e9),
        (FluxTransformerConfig(width=192, heads=3, double_blocks=2, single_blocks=4), 32, 384, 4_632_576),
        (FluxTransformerConfig(per_block_modulation=True), 32, 1024, 2.582e9),
    ],
    ids=["2B", "2B-T5", "FLUX.2-dev", "Klein-4B", "tiny", "per-block"],
)
def test_sizes(config, channels, text_width, expected):
    """Published where published (FLUX.2-dev 32 B, Klein 4 B), else by the formula of the products' widths."""
    assert count(config, channels, text_width)[0] == pytest.approx(expected, rel=5e-4 if expected > 3e9 else 1e-4)
    if isinstance(expected, int):
        assert count(config, channels, text_width)[0] == expected


def test_the_size_of_flux_1():
    """19 + 38 blocks of width 3072 with their own modulation and GELU: 11.90 B, less biases and the pooled caption."""
    config = FluxTransformerConfig(3072, 24, 19, 38, mlp="gelu", mlp_ratio=4, per_block_modulation=True)
    assert count(config, 64, 4096)[0] == pytest.approx(11.88e9, rel=2e-3)


def test_what_is_no_matrix_is_small():
    assert count(FluxTransformerConfig(), 32, 1024)[1] == 6 * 4 * 128 + 24 * 2 * 128 + 2048  # norms, the padding token


def test_it_is_diffusers_flux_2_with_rms_norms():
    """The same weights give diffusers' velocity when its LayerNorms are RMSNorms (docs/decisions.md)."""
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    ours, (z, t, text, _) = tiny(mask="none"), inputs()
    axes = list(axes_of(TINY))
    theirs = Flux2Transformer2DModel(1, 4, None, 1, 2, 32, 2, 24, axes_dims_rope=axes, rope_theta=10_000,
                                     guidance_embeds=False)  # fmt: skip
    theirs.load_state_dict(their_names(ours))
    for module in list(theirs.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm) or type(child).__name__ == "LayerNorm":
                setattr(module, name, nn.RMSNorm(64, eps=1e-6, elementwise_affine=False))
    lengths = torch.full((2,), 8)  # no padding: diffusers has no token for it
    ids = torch.zeros(8, 3)
    ids[:, 0] = torch.arange(8)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    image = z.flatten(2).transpose(1, 2)
    expected = theirs(image, text, t, places, ids, return_dict=False)[0]  # it takes times from 0 to 1 too
    found = ours(z, t, text, lengths)
    torch.testing.assert_close(found, expected.transpose(1, 2).unflatten(2, (4, 4)), rtol=1e-4, atol=1e-5)


def their_names(ours: FluxTransformer) -> dict[str, torch.Tensor]:
    """Our weights under diffusers' names."""
    w = ours.state_dict()
    found = {
        "x_embedder.weight": w["image_in.weight"],
        "context_embedder.weight": w["text_in.weight"],
        "proj_out.weight": w["final.linear.weight"],
        # diffusers splits into scale and shift, we into shift and scale
        "norm_out.linear.weight": torch.cat(w["final.modulation.linear.weight"].chunk(2)[::-1]),
        "single_stream_modulation.linear.weight": w["single_modulation.linear.weight"],
        "double_stream_modulation_img.linear.weight": w["image_modulation.linear.weight"],
        "double_stream_modulation_txt.linear.weight": w["text_modulation.linear.weight"],
    }
    for number, layer in enumerate(("linear_1", "linear_2")):
        found[f"time_guidance_embed.timestep_embedder.{layer}.weight"] = w[f"time.mlp.{2 * number}.weight"]
    for block in range(len(ours.double_blocks)):
        here, there = f"double_blocks.{block}", f"transformer_blocks.{block}"
        added = ("add_q_proj add_k_proj add_v_proj", "norm_added_q norm_added_k", "to_add_out", "ff_context")
        named = {"image": ("to_q to_k to_v", "norm_q norm_k", "to_out.0", "ff"), "text": added}
        for stream, (qkv, norms, out, mlp) in named.items():
            parts = w[f"{here}.{stream}.qkv.weight"].chunk(3)
            found |= {f"{there}.attn.{name}.weight": p for name, p in zip(qkv.split(), parts, strict=True)}
            for own, name in zip(("q_norm", "k_norm"), norms.split(), strict=True):
                found[f"{there}.attn.{name}.weight"] = w[f"{here}.{stream}.{own}.weight"]
            found[f"{there}.attn.{out}.weight"] = w[f"{here}.{stream}.proj.weight"]
            found[f"{there}.{mlp}.linear_in.weight"] = w[f"{here}.{stream}.mlp.into.weight"]
            found[f"{there}.{mlp}.linear_out.weight"] = w[f"{here}.{stream}.mlp.out.weight"]
    for block in range(len(ours.single_blocks)):
        here, there = f"single_blocks.{block}", f"single_transformer_blocks.{block}.attn"
        found[f"{there}.to_qkv_mlp_proj.weight"] = torch.cat([w[f"{here}.{n}.weight"] for n in ("qkv", "mlp.into")])
        found[f"{there}.to_out.weight"] = torch.cat([w[f"{here}.{n}.weight"] for n in ("proj", "mlp.out")], dim=1)
        found |= {f"{there}.norm_{name}.weight": w[f"{here}.{name}_norm.weight"] for name in "qk"}
    return found


def test_it_starts_at_zero_and_every_weight_is_reached():
    z, t, text, lengths = inputs()
    fresh = FluxTransformer(TINY, 4, (4, 4), 24)
    assert torch.count_nonzero(fresh(z, t, text, lengths)) == 0
    model = tiny()
    model(z, t, text, lengths).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_lies_behind_a_caption_is_not_read():
    model, (z, t, text, lengths) = tiny(), inputs()
    other = text.clone()
    other[0, 3:] = 100.0  # the first caption has three tokens
    assert torch.equal(model(z, t, other, lengths), model(z, t, text, lengths))
    other[0, 2] = 100.0
    assert not torch.equal(model(z, t, other, lengths)[0], model(z, t, text, lengths)[0])


def test_padding_counts_up_to_the_multiple_and_no_further():
    z, t, text, lengths = inputs(batch=1)
    model = tiny(double_blocks=0)
    short, long = (
        model(z, t, text[:, :4], lengths),
        model(z, t, text, lengths),
    )  # 3 tokens, padded to 4: the rest is masked
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
    seen = tiny(double_blocks=0, mask="none")
    assert not torch.allclose(seen(z, t, text[:, :4], lengths), seen(z, t, text, lengths), atol=1e-3)


def test_other_grids_patches_and_dialects_run():
    t, text, lengths = inputs()[1:]
    wide = torch.randn(2, 4, 4, 6)
    for options in ({}, {"patch_size": 2}, {"mlp": "gelu", "mlp_ratio": 4}, {"per_block_modulation": True},
                    {"single_blocks": 0}, {"double_blocks": 0}, {"centred_positions": True}):  # fmt: skip
        assert tiny(**options)(wide, t, text, lengths).shape == wide.shape
    with pytest.raises(UserError, match="divisible by the patch size 2"):
        tiny(patch_size=2)(torch.randn(2, 4, 5, 6), t, text, lengths)


def test_tables_of_positions_are_kept_for_the_grids_that_occur():
    model, device = tiny(), torch.device("cpu")
    first, second = ([model._rope(3, (height, 2), device) for height in range(1, GRIDS + 1)] for _ in range(2))
    assert all(one[0] is two[0] for one, two in zip(first, second, strict=True))
    model._rope(3, (1, 9), device)
    assert len(model._ropes) == GRIDS and model._rope(3, (2, 2), device)[0] is first[1][0]
    again = model._rope(3, (1, 2), device)
    assert again[0] is not first[0][0] and torch.equal(again[0], first[0][0]), "the oldest was dropped"


def test_patches_go_there_and_back():
    model, z = tiny(patch_size=2), torch.randn(2, 4, 4, 6)
    assert torch.equal(model._unpatch(model._patches(z, (2, 3)), (2, 3)), z)


def test_positions():
    cos, sin = rope_pairs(TINY, 3, (2, 2))
    assert cos.shape == (7, 16) and axes_of(TINY) == (8, 12, 12)
    text, image = torch.atan2(sin, cos)[:3], torch.atan2(sin, cos)[3:]
    assert text[:, 4:].abs().max() == 0 and image[:, :4].abs().max() == 0  # each on axes of its own
    torch.testing.assert_close(text[:, 0], torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(image[:, 4], torch.tensor([0.0, 0.0, 1.0, 1.0]))  # rows
    torch.testing.assert_close(image[:, 10], torch.tensor([0.0, 1.0, 0.0, 1.0]))  # columns
    middle = rope_pairs(FluxTransformerConfig(**{**vars(TINY), "centred_positions": True}), 3, (2, 2))
    torch.testing.assert_close(torch.atan2(*middle[::-1])[3:, 4], torch.tensor([-0.5, -0.5, 0.5, 0.5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "multiple of 16; try width 192"),
        ({"rope_axes": (8, 12, 10)}, "add up to the head width 32"),
        ({"rope_axes": (9, 11, 12)}, "three even numbers"),
        ({"double_blocks": 0, "single_blocks": 0}, "at least one block"),
        ({"attention": "fused"}, "cannot run here"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)(*inputs())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_give_the_same_gradients(mode):
    found = []
    for checkpointing in ("none", mode):
        model = tiny()
        prepare(model.transformer_blocks(), checkpointing, compile=False)
        model(*inputs()).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
        restore(model.transformer_blocks())
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_half_precision_weights():
    z, t, text, lengths = inputs()
    expected, found = tiny()(z, t, text, lengths), tiny().bfloat16()(z, t, text, lengths)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
