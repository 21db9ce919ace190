"""Published checkpoints into folders: every tensor accounted for, and the same numbers as the published networks."""

import itertools
import math
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from zoo_peers import (
    LDM,
    block_shapes,
    common_shapes,
    ditdh,
    ldm_shapes,
    lightningdit,
    patch_shapes,
    random_state,
    sincos,
)
from zoo_rivals import TINY_VIT

from aligntok import cli
from aligntok.config import DecoderConfig
from aligntok.diffusion.condition import Condition
from aligntok.diffusion.sampler import integrate
from aligntok.errors import UserError
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import load_tokenizer
from aligntok.zoo.converters import CONVERTERS, convert
from aligntok.zoo.converters.rae import ENCODERS

MULTIPLIERS, D, SIDE = (1, 1, 2), 4, 4


def vavae_state() -> dict[str, torch.Tensor]:
    return random_state(ldm_shapes(32, MULTIPLIERS, 2, D))


@pytest.fixture
def vavae(tmp_path):
    """A converted VA-VAE's folder, f4 with 4 channels, and its tensors under their published names."""
    state = vavae_state()
    extra = {"loss.discriminator.main.0.weight": torch.zeros(2), "foundation_model.model.norm.weight": torch.zeros(3)}
    file, statistics = tmp_path / "vavae.ckpt", tmp_path / "latents_stats.pt"
    torch.save({"state_dict": state | extra | {"linear_proj.weight": torch.zeros(1)}, "epoch": 3}, file)
    torch.save({"mean": torch.arange(4.0).view(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 2.0)}, statistics)
    report = convert("hustvl-vavae", file, tmp_path / "vavae", statistics=str(statistics))
    assert report.converted == len(state) and sum(report.ignored.values()) == 3
    return tmp_path / "vavae", state


@torch.no_grad()
def test_vavae_computes_what_ldm_computes(vavae):
    folder, state = vavae
    ours, peer = load_tokenizer(folder), LDM(state, len(MULTIPLIERS), 2)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, logvar = peer.moments(images).chunk(2, 1)
    posterior = ours.posterior(images)
    torch.testing.assert_close(posterior.mean, mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(posterior.logvar, logvar.clamp(-30, 20), atol=1e-5, rtol=1e-4)
    expected = (mean - torch.arange(4.0).view(4, 1, 1)) / 2
    torch.testing.assert_close(ours.encode(images), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode(expected), peer.decode(mean), atol=2e-5, rtol=1e-4)
    assert ours.config.networks == DecoderConfig(32, MULTIPLIERS, 2, 32, (2,))


def test_published_vavae_is_the_default_configuration(tmp_path):
    """Its layout at f16d32, on the meta device: every size is read from the shapes."""
    from aligntok.zoo.converters.vavae import config_of

    shapes = ldm_shapes(128, (1, 1, 2, 2, 4), 2, 32)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = config_of(state, tmp_path)
    assert config.networks == DecoderConfig() and config.latent_channels == 32
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(28.4132 + 41.4176 + 0.0052, abs=1e-3)


# width, depth, heads of the small generator: 384 wide ones have 6 heads in the published table
WIDTH, CLASSES = 384, 3


def lightningdit_state(depth: int = 2) -> dict[str, torch.Tensor]:
    shapes = common_shapes(WIDTH, WIDTH, D, CLASSES, 256) | patch_shapes("x_embedder", WIDTH, D)
    for index in range(depth):
        shapes |= block_shapes(f"blocks.{index}", WIDTH)
    rope = {f"feat_rope.freqs_{name}": torch.zeros(SIDE * SIDE, 64) for name in ("cos", "sin")}
    return random_state(shapes) | {"pos_embed": sincos(SIDE, WIDTH)} | rope


@pytest.fixture
def generator(vavae, tmp_path):
    state, file = lightningdit_state(), tmp_path / "lightningdit.pt"
    torch.save({"ema": {f"module.{name}": value for name, value in state.items()}, "model": {}}, file)
    report = convert("hustvl-lightningdit", file, tmp_path / "generator", tokenizer=str(vavae[0]))
    assert report.converted == len(state) - 2 and sum(report.ignored.values()) == 2
    return tmp_path / "generator", state


@torch.no_grad()
def test_lightningdit_velocity_is_theirs_negated_at_the_mirrored_time(generator, vavae):
    ours, state = Generator(generator[0]), generator[1]
    assert ours.tokenizer_fingerprint == load_tokenizer(vavae[0]).fingerprint()
    z, t, labels = torch.randn(3, D, SIDE, SIDE), torch.tensor([0.03, 0.5, 1.0]), torch.tensor([0, 2, CLASSES])
    expected = -lightningdit(state, z, 1 - t, labels, heads=6)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.model(z, t, labels), expected, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def their_samples(state, noise, labels, points, shift, scale, start) -> torch.Tensor:
    """LightningDiT's Euler from t' = 0 on a shifted grid, with guidance on the first three channels."""
    grid = torch.linspace(0, 1, points)
    grid = shift * grid / (1 + (shift - 1) * grid)
    z, null = noise, torch.full_like(labels, CLASSES)
    for t, following in itertools.pairwise(grid):
        times = torch.full((len(z),), float(t))
        v = lightningdit(state, z, times, labels, heads=6)
        if t >= start:
            unconditional = lightningdit(state, z, times, null, heads=6)
            v = torch.cat([unconditional[:, :3] + scale * (v[:, :3] - unconditional[:, :3]), v[:, 3:]], 1)
        z = z + (following - t) * v
    return z


@pytest.mark.parametrize(("preset", "scale", "start"), [("64ep", 10.0, 0.1), ("800ep", 6.7, 0.125)])
def test_sampling_follows_the_published_sampler(preset, scale, start, vavae, tmp_path):
    state, file = lightningdit_state(), tmp_path / "lightningdit.safetensors"
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"] / 8  # guidance of 10 would blow up noise
    save_file(state, file)
    convert("hustvl-lightningdit", file, tmp_path / "g", tokenizer=str(vavae[0]), preset=preset)
    ours = Generator(tmp_path / "g")
    assert (ours.sampler.steps, ours.sampler.guidance_channels) == (249, 3)
    ours.sampler.steps = 11
    noise, labels = torch.randn(2, D, SIDE, SIDE), torch.tensor([0, 1])
    expected = their_samples(state, noise, labels, 12, 0.3, scale, start)
    found = integrate(ours.model, noise, Condition.of_labels(labels, ours.model.null_class), ours.sampler)
    assert (expected - noise).std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


HEAD = 768  # 12 heads


def ditdh_state() -> dict[str, torch.Tensor]:
    shapes = common_shapes(WIDTH, HEAD, D, CLASSES, 512) | {"t_embedder.W": (256,)}
    shapes |= patch_shapes("s_embedder", WIDTH, D) | patch_shapes("x_embedder", HEAD, D)
    shapes |= {"s_projector.weight": (HEAD, WIDTH), "s_projector.bias": (HEAD,)}
    shapes |= block_shapes("blocks.0", WIDTH) | block_shapes("blocks.1", WIDTH) | block_shapes("blocks.2", HEAD)
    tables = {f"{side}_feat_rope.freqs_cos": torch.zeros(SIDE * SIDE, 64) for side in ("enc", "dec")}
    return random_state(shapes) | {"pos_embed": sincos(SIDE, WIDTH)} | tables


@torch.no_grad()
def test_ditdh_computes_what_rae_computes_in_the_same_direction(vavae, tmp_path):
    state, file = ditdh_state(), tmp_path / "stage2_model.pt"
    torch.save(state, file)
    report = convert("rae-ditdh", file, tmp_path / "g", tokenizer=str(vavae[0]))
    assert report.converted == len(state) - 2
    ours = Generator(tmp_path / "g")
    z, t, labels = torch.randn(3, D, SIDE, SIDE), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 2, CLASSES])
    expected = ditdh(state, z, t, labels, depth=2, heads=(6, 12))
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.model(z, t, labels), expected, atol=2e-4, rtol=1e-3)
    assert (ours.sampler.steps, ours.sampler.guidance, ours.sampler.end) == (49, 1.0, 0.001)
    assert ours.sampler.guidance_interval == (0.0, 1.0)
    assert ours.sampler.time_shift == pytest.approx(math.sqrt(D * SIDE * SIDE / 4096))


@pytest.mark.parametrize(("size", "expected"), [("S", 196.456), ("XL", 838.676)])
def test_published_ditdh(size, expected):
    """DiT^DH-XL has "about 839 M" parameters (RAE)."""
    from aligntok.config import LightningDiTConfig
    from aligntok.models.dit_dh import DiTDH

    with torch.device("meta"):
        model = DiTDH(LightningDiTConfig(size=size, classes=1000, head_depth=2), 768, (16, 16))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, abs=1e-3)


def rae_state(channels: int = 192, width: int = 384, hidden: int = 96) -> dict[str, torch.Tensor]:
    layers = {"decoder_embed": (width, channels), "decoder_pred": (768, width)}
    norms = ["decoder_norm"]
    for index in range(2):
        name = f"decoder_layers.{index}"
        layers |= {f"{name}.attention.attention.{part}": (width, width) for part in ("query", "key", "value")}
        layers |= {f"{name}.attention.output.dense": (width, width), f"{name}.output.dense": (width, hidden)}
        layers |= {f"{name}.intermediate.dense": (hidden, width)}
        norms += [f"{name}.layernorm_before", f"{name}.layernorm_after"]
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    positions = torch.cat([torch.zeros(1, 1, width), sincos(2, width)], 1)
    return random_state(shapes | {"trainable_cls_token": (1, 1, width)}) | {"decoder_pos_embed": positions}


@torch.no_grad()
def test_rae_decoder_and_its_statistics(tmp_path):
    """What its tensors compute is compared with diffusers in test_rae.py; here, that they arrive and are all used."""
    state, file, statistics = rae_state(), tmp_path / "model.pt", tmp_path / "stat.pt"
    torch.save(state, file)
    mean, var = torch.randn(192, 2, 2), torch.rand(192, 2, 2)
    torch.save({"mean": mean, "var": var}, statistics)
    options = RANDOM | {"statistics": str(statistics)}
    report = convert("rae-decoder", file, tmp_path / "rae", **options)
    assert report.converted == len(state) - 1 and sum(report.ignored.values()) == 1
    rae = load_tokenizer(tmp_path / "rae")
    assert rae.config.image_size == 32 and rae.decoder.blocks[0].attn.num_heads == 6
    torch.testing.assert_close(rae.latent_std, (var + 1e-5).sqrt())
    assert torch.equal(rae.latent_mean, mean)
    qkv = rae.decoder.blocks[1].attn.qkv.weight
    parts = [state[f"decoder_layers.1.attention.attention.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(qkv, torch.cat(parts))
    assert torch.equal(rae.decoder.prediction.bias, state["decoder_pred.bias"])


def remove(state):
    del state["decoder.mid.attn_1.k.bias"]


def add(state):
    state["decoder.extra"] = torch.zeros(1)


def reshape(state):
    state["decoder.conv_in.weight"] = torch.zeros(64, 5, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"1 missing: decoder\.mid\.attn_1\.k\.bias"),
        (add, r"1 unexpected: decoder\.extra"),
        (reshape, r"1 misshapen: decoder\.conv_in\.weight \[64, 5, 3, 3\] instead of \[64, 4, 3, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    state = vavae_state()
    change(state)
    save_file(state, tmp_path / "v.safetensors")
    with pytest.raises(UserError, match=message) as raised:
        convert("hustvl-vavae", tmp_path / "v.safetensors", tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


RANDOM = {"encoder": TINY_VIT, "encoder_weights": "random"}
# Layout -> tensors, and one of them that sizes are read from, one that is not, one that goes into a packed qkv
LAYOUTS = {
    "hustvl-vavae": (vavae_state, "post_quant_conv.weight", "decoder.conv_out.bias", "decoder.mid.attn_1.k.weight"),
    "hustvl-lightningdit": (lightningdit_state, "pos_embed", "blocks.1.norm2.weight", "blocks.0.attn.qkv.bias"),
    "rae-ditdh": (ditdh_state, "x_embedder.proj.weight", "s_projector.bias", "blocks.2.attn.qkv.weight"),
    "rae-decoder": (
        rae_state,
        "decoder_embed.weight",
        "decoder_norm.bias",
        "decoder_layers.0.attention.attention.key.weight",
    ),
}


@pytest.fixture(scope="module")
def latents_of_four_channels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vavae")
    torch.save(vavae_state(), folder / "vavae.pt")
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, folder / "stats.pt")
    convert("hustvl-vavae", folder / "vavae.pt", folder / "t", statistics=str(folder / "stats.pt"))
    return str(folder / "t")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_converter_names_what_does_not_fit(layout, latents_of_four_channels, tmp_path):
    """Missing, unexpected and misshapen tensors, whatever they are for: one line with their names, nothing written."""
    build, *names = LAYOUTS[layout]
    options = RANDOM if layout == "rae-decoder" else {"tokenizer": latents_of_four_channels}
    options = {} if layout == "hustvl-vavae" else options
    original = build()

    def refused(state) -> str:
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(UserError) as raised:
            convert(layout, tmp_path / "x.pt", tmp_path / "out", **options)
        assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
        return str(raised.value)

    assert "1 unexpected: some.thing" in refused(original | {"some.thing": torch.zeros(1)})
    four = refused(original | {f"other{index}": torch.zeros(1) for index in range(4)})
    assert "4 unexpected: other0, other1, other2, ..." in four, "the first three"
    for name in names:
        assert name in refused({key: value for key, value in original.items() if key != name}), "missing"
        for wrong in (torch.zeros(()), torch.zeros(0), original[name][None]):
            assert name in refused(original | {name: wrong}), (name, list(wrong.shape))
    _, other, packed = names
    for name in (other, packed):
        longer = torch.cat([original[name], original[name][:1]])
        assert f"1 misshapen: {name} {list(longer.shape)} instead of {list(original[name].shape)}" in refused(
            original | {name: longer}
        )


def test_levels_that_are_not_ldms_are_refused(tmp_path):
    state = vavae_state()
    torch.save({key: value for key, value in state.items() if "encoder.down" not in key}, tmp_path / "none.pt")
    narrow = {"encoder.down.1.block.0.conv1.weight": torch.zeros(40, 32, 3, 3)}
    torch.save(state | narrow, tmp_path / "narrow.pt")
    for name, found in (("none", r"levels of \[\]"), ("narrow", r"levels of \[32, 40, 64\] channels")):
        with pytest.raises(UserError, match=found):
            convert("hustvl-vavae", tmp_path / f"{name}.pt", tmp_path / "out")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def bad_files(folder):
    """File to convert -> layout, options, message."""
    torch.save({"state_dict": Evil()}, folder / "evil.ckpt")
    (folder / "cut.safetensors").write_bytes(b"\x08")
    torch.save([1, 2], folder / "list.pt")
    torch.save(vavae_state(), folder / "vavae.pt")
    torch.save(rae_state(), folder / "rae.pt")
    torch.save(rae_state() | {"decoder_pos_embed": torch.zeros(1, 5, 384)}, folder / "positions.pt")
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, folder / "stat3.pt")
    torch.save(lightningdit_state(1), folder / "dit.pt")
    yield (
        "evil.ckpt",
        "hustvl-vavae",
        {},
        r"cannot be read as weights without executing code \(UnpicklingError: Weights only load failed\)",
    )
    yield "cut.safetensors", "hustvl-vavae", {}, "cannot be read"
    yield "list.pt", "hustvl-vavae", {}, "holds no state dict"
    yield "nothing.pt", "hustvl-vavae", {}, "no file"
    yield "vavae.pt", "somebody", {}, "expected one of hustvl-vavae"
    yield "vavae.pt", "hustvl-vavae", {"preset": "64ep"}, "--preset means nothing to --from hustvl-vavae"
    yield "vavae.pt", "hustvl-vavae", {"statistics": str(folder / "stat3.pt")}, "3 channels, expected 4"
    yield "vavae.pt", "rae-decoder", RANDOM, "decoder_embed.weight is missing"
    yield "rae.pt", "rae-decoder", RANDOM | {"encoder": "vit_small_patch16_224"}, "192 channels, .* has 384"
    yield "positions.pt", "rae-decoder", RANDOM, "not the sin-cos table"
    yield "rae.pt", "rae-decoder", RANDOM | {"statistics": str(folder / "stat3.pt")}, "var is missing"
    yield "dit.pt", "hustvl-lightningdit", {}, "belongs to a tokenizer"
    yield "dit.pt", "hustvl-lightningdit", {"preset": "1ep"}, "--preset is '1ep'"
    yield "dit.pt", "rae-ditdh", {}, "s_embedder.proj.weight is missing"


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    for file, layout, options, message in bad_files(tmp_path):
        with pytest.raises(UserError) as raised:
            convert(layout, tmp_path / file, tmp_path / "out", **options)
        assert re.search(message, str(raised.value)) and "\n" not in str(raised.value), (file, layout, raised.value)
    assert "executed" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_generators_of_other_latents_are_refused(vavae, tmp_path):
    state = lightningdit_state(1) | {"x_embedder.proj.weight": torch.zeros(WIDTH, 9, 1, 1)}
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(UserError, match="4 latent channels, the checkpoint 9"):
        convert("hustvl-lightningdit", tmp_path / "dit.pt", tmp_path / "out", tokenizer=str(vavae[0]))


def test_command(tmp_path, capsys):
    state = vavae_state()
    save_file(state, tmp_path / "v.safetensors")
    arguments = ["convert", "--from", "hustvl-vavae", str(tmp_path / "v.safetensors"), "--output", str(tmp_path / "t")]
    assert cli.main(arguments) == 0
    assert f"converted {len(state)} tensors" in (told := capsys.readouterr().out) and "aligntok statistics" in told
    assert not load_tokenizer(tmp_path / "t", require_statistics=False).has_statistics
    assert cli.main([*arguments[:2], "nobody", *arguments[3:]]) == 2
    assert "--from is 'nobody'" in capsys.readouterr().err


def test_help_speaks_of_from_and_shows_every_layout(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    told = capsys.readouterr().out
    assert told.startswith("usage: aligntok convert --from LAYOUT FILE --output FOLDER [options]")
    assert "--layout" not in told and "--file" not in told and "  --from LAYOUT" in told
    assert all(f"aligntok convert --from {layout} " in told for layout in CONVERTERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --from LAYOUT FILE"),
        (["x.pt", "--output", "y"], "give --from LAYOUT FILE"),
        (["--from", "flux-ae", "--output", "y"], "give --from LAYOUT FILE"),
        (["--from", "flux-ae", "x.pt"], "output"),
        (["x.pt", "--output", "y", "--from"], "--from"),
    ],
)
def test_what_is_missing_is_named_as_it_is_written(arguments, message, capsys):
    assert cli.main(["convert", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and "--layout" not in told


def test_an_output_that_is_taken_is_refused_before_any_work(tmp_path):
    source, folder = tmp_path / "source.pt", tmp_path / "precious"
    source.write_bytes(b"weights")
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        convert("hustvl-vavae", source, source)
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex\)"):
        convert("hustvl-vavae", source, folder)
    assert source.read_bytes() == b"weights" and (folder / "thesis.tex").read_text() == "mine"


def test_a_tokenizers_folder_is_not_replaced_by_a_generator(vavae, tmp_path):
    torch.save(lightningdit_state(1), tmp_path / "dit.pt")
    before = (vavae[0] / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"says format 'aligntok\.zoo\.vae'"):
        convert("hustvl-lightningdit", tmp_path / "dit.pt", vavae[0], tokenizer=str(vavae[0]))
    assert (vavae[0] / "config.json").read_bytes() == before


def test_an_rae_decoder_does_not_tell_its_encoder(tmp_path):
    torch.save(rae_state(), tmp_path / "rae.pt")
    with pytest.raises(UserError, match=r"give --encoder.*reg4_dinov2.*siglip_256.*mae"):
        convert("rae-decoder", tmp_path / "rae.pt", tmp_path / "out")


def test_the_named_encoders_are_timms_and_equally_wide():
    for name in ENCODERS:
        with torch.device("meta"):
            assert timm.create_model(name).num_features == 768
