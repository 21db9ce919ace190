"""Converters of FLUX's and Stable Diffusion's autoencoders: equal to diffusers' own network, and strict."""

import json
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL as Peer
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from aligntok.config import DecoderConfig, VAEConfig
from aligntok.errors import UserError
from aligntok.models.tokenizer import load_tokenizer
from aligntok.zoo.converters import diffusers as convert_diffusers
from aligntok.zoo.converters import flux as convert_flux
from aligntok.zoo.converters.flux import flux_config
from aligntok.zoo.converters.ldm_keys import diffusers_names, ldm_names
from aligntok.zoo.vae import VAE


def peer(widths: tuple[int, ...], latent_channels: int, groups: int, **options) -> Peer:
    """diffusers' network with random weights; norms too, which start at 1 and 0 and would hide a mix-up."""
    torch.manual_seed(0)
    made = Peer(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=list(widths),
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=groups,
        **options,
    ).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def flux_peer(widths: tuple[int, ...] = (8, 16, 32, 32), groups: int = 4) -> Peer:
    options = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    return peer(widths, 16, groups, **options)


def stable_diffusion() -> VAEConfig:
    networks = DecoderConfig(channel_multipliers=(1, 2, 4, 4), attention_levels=())
    return VAEConfig(latent_channels=4, networks=networks)


def ldm_state(model: Peer, levels: int, config: VAEConfig) -> dict[str, torch.Tensor]:
    """`model`'s tensors under LDM's names and shapes, found by letting diffusers' own reader translate the names."""
    with torch.device("meta"):
        names = [key for ours in VAE(config).state_dict() for key in ldm_names(levels)(ours)]
    marked = {name: torch.full((1, 1, 1, 1), float(i)) for i, name in enumerate(names)}
    read = convert_ldm_vae_checkpoint(marked, {"down_block_types": [""] * levels, "up_block_types": [""] * levels})
    theirs = {names[int(mark.flatten()[0])]: key for key, mark in read.items()}
    assert theirs.keys() == set(names) and set(theirs.values()) == model.state_dict().keys()
    state = {name: model.state_dict()[key] for name, key in theirs.items()}
    attention = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    return {k: v[:, :, None, None] if k.endswith(attention) else v for k, v in state.items()}


@torch.no_grad()
def check_equal(model: Peer, tokenizer: VAE, size: tuple[int, int]) -> None:
    """Same network in float64; in float32 no further from it than rounding takes diffusers' own."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    unpack = partial(pixel_shuffle, upscale_factor=tokenizer.config.packing)
    found = []
    for dtype in (torch.float32, torch.float64):
        peer, ours, x = model.to(dtype), tokenizer.to(dtype), images.to(dtype)
        mean = peer.encode(x).latent_dist.mean
        raw = pixel_unshuffle(mean, tokenizer.config.packing)
        found.append(((unpack(ours.raw_latents(x)), mean), (ours.reconstruct(raw), peer.decode(mean).sample)))
    for (ours, theirs), (ours64, theirs64) in zip(*found, strict=True):
        assert theirs64.std() > 0.1  # so that the differences below mean something
        assert (ours64 - theirs64).abs().max() < 1e-12
        assert (ours - theirs64).abs().max() < 4 * (theirs - theirs64).abs().max() < 1e-4
    latents = (mean - (model.config.shift_factor or 0.0)) * model.config.scaling_factor
    torch.testing.assert_close(unpack(tokenizer.float().encode(images)), latents.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_diffusers_layout(tmp_path, kind):
    model = peer((8, 16, 32, 32), 4, 4) if kind == "sd" else flux_peer()
    model.save_pretrained(tmp_path / "vae")
    report = convert_diffusers.convert(tmp_path / "vae", tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    check_equal(model, tokenizer, (32, 48))
    assert report.converted == len(model.state_dict()) and tokenizer.fingerprint() in str(report)


def test_diffusers_old_attention_names_and_torch_files(tmp_path):
    """The layout of stabilityai/sd-vae-ft-mse: query, key, value, proj_attn, and no scaling_factor in config.json."""
    model = peer((8, 16), 4, 4)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.state_dict()
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for key, v in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    config = {k: v for k, v in model.config.items() if k not in ("scaling_factor", "shift_factor")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert_diffusers.convert(tmp_path / "diffusion_pytorch_model.bin", tmp_path / "t")
    check_equal(model, load_tokenizer(tmp_path / "t"), (16, 16))


def test_flux_layout(tmp_path):
    model = flux_peer()
    network = DecoderConfig(8, (1, 2, 4, 4), groups=4, attention_levels=())
    config = VAEConfig(latent_channels=16, networks=network, quant_convs=False, packing=2)
    state = ldm_state(model, 4, config)
    assert {"encoder.down.1.block.0.nin_shortcut.weight", "decoder.up.0.block.2.conv2.bias"} <= state.keys()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "ae.safetensors")
    convert_flux.convert(tmp_path / "ae.safetensors", tmp_path / "t", config)
    tokenizer = load_tokenizer(tmp_path / "t")
    assert (tokenizer.latent_channels, tokenizer.downsample) == (64, 16)
    check_equal(model, tokenizer, (32, 48))


@torch.no_grad()
def test_full_size_flux(tmp_path):
    """Published widths on one small image, from FLUX's own file layout; the default configuration of the converter."""
    model = flux_peer((128, 256, 512, 512), 32)
    save_file({k: v.contiguous() for k, v in ldm_state(model, 4, flux_config()).items()}, tmp_path / "ae.safetensors")
    convert_flux.convert(tmp_path / "ae.safetensors", tmp_path / "t")
    tokenizer, images = load_tokenizer(tmp_path / "t"), torch.rand(1, 3, 16, 16) * 2 - 1
    mean = model.encode(images).latent_dist.mean
    torch.testing.assert_close(pixel_shuffle(tokenizer.raw_latents(images), 2), mean, atol=1e-5, rtol=0)
    ours = tokenizer.decode(0.3611 * (pixel_unshuffle(mean, 2) - 0.1159))
    # 1.2e-5 is as far as rounding takes diffusers' decoder from its own result in float64
    torch.testing.assert_close(ours, model.decode(mean).sample, atol=4e-5, rtol=0)


def test_names_agree_with_diffusers_at_the_published_size():
    with torch.device("meta"):
        ours, theirs = VAE(stable_diffusion()), peer((128, 256, 512, 512), 4, 32)
    names = [key for name in ours.state_dict() for key in diffusers_names(4)(name)]
    assert len(names) == len(set(names)) and set(names) == theirs.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.conv_in.bias"), r"1 missing: encoder\.conv_in\.bias"),
        (lambda s: s.pop("decoder.mid.attn_1.k.weight"), r"1 missing: decoder\.mid\.attn_1\.k\.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (
            lambda s: s.update({"encoder.conv_in.bias": torch.zeros(9)}),
            r"encoder\.conv_in\.bias \[9\] instead of \[8\]",
        ),
        (lambda s: s.update({"decoder.mid.attn_1.q.bias": torch.zeros(9)}), r"q\.bias \[9\] instead of \[16\]"),
    ],
)
def test_flux_files_that_do_not_fit(tmp_path, change, message):
    network = DecoderConfig(8, (1, 2), groups=4, attention_levels=())
    config = VAEConfig(latent_channels=16, networks=network, quant_convs=False, packing=2)
    state = ldm_state(flux_peer((8, 16)), 2, config)
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        convert_flux.convert(tmp_path / "ae.safetensors", tmp_path / "t", config)
    assert "\n" not in str(caught.value) and not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("quant_conv.bias"), r"1 missing: quant_conv\.bias"),
        (lambda s: s.update({"a": torch.zeros(1), "b": torch.zeros(1)}), "2 unexpected: a, b"),
        (lambda s: s.update({"quant_conv.bias": torch.zeros(9)}), r"1 misshapen: quant_conv\.bias \[9\] instead of"),
        (lambda s: s.update({"quant_conv.bias": torch.zeros(())}), r"1 misshapen: quant_conv\.bias \[\] instead of"),
        (
            lambda s: s.update({"encoder.mid_block.attentions.0.to_k.weight": torch.zeros(3, 3)}),
            r"1 misshapen: encoder\.mid_block\.attentions\.0\.to_k\.weight \[3, 3, 1, 1\]",
        ),
    ],
)
def test_diffusers_files_that_do_not_fit(tmp_path, change, message):
    model = peer((8, 16), 4, 4)
    model.save_pretrained(tmp_path / "vae")
    state = model.state_dict()
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        convert_diffusers.convert(tmp_path / "vae", tmp_path / "t")
    assert "\n" not in str(caught.value) and not (tmp_path / "t").exists()


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_files_that_are_not_weights(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        convert_flux.convert(tmp_path / "absent.safetensors", tmp_path / "t")
    (tmp_path / "ae.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match=r"cannot be read .*damaged or incomplete"):
        convert_flux.convert(tmp_path / "ae.safetensors", tmp_path / "t")
    torch.save({"state_dict": Hostile()}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="cannot be read as weights without executing code"):
        convert_flux.convert(tmp_path / "ae.pt", tmp_path / "t")
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        convert_diffusers.convert(tmp_path / "pipeline", tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}, "expected DownEncoderBlock2D"),
        ({"block_out_channels": [8, 12]}, "multiples of the first"),
        ({"use_quant_conv": False}, "both or none"),
        ({"norm_num_groups": 5}, "multiples of"),
        ({"latent_channels": 16}, "of the published layout"),
        ({"latent_channels": None}, "latent_channels is None, expected a whole number"),
        ({"layers_per_block": "1"}, "layers_per_block is '1', expected a whole number"),
        ({"block_out_channels": 8}, "block_out_channels is 8, expected a list"),
        ({"block_out_channels": [0, 0]}, r"block_out_channels is \[0, 0\], expected a list"),
        ({"scaling_factor": None}, "scaling_factor is None and shift_factor 0.0, expected a scale above 0"),
        ({"scaling_factor": 0}, "scaling_factor is 0 and"),
    ],
)
def test_other_architectures_are_refused(tmp_path, change, message):
    peer((8, 16), 4, 4).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        convert_diffusers.convert(tmp_path, tmp_path / "t")
    assert "\n" not in str(caught.value)


def test_a_pipeline_is_converted_from_its_vae_folder_also_in_half_precision(tmp_path):
    made = peer((8, 16), 4, 4)
    made.half().save_pretrained(tmp_path / "pipeline/vae", variant="fp16")
    (tmp_path / "pipeline/unet").mkdir()
    report = convert_diffusers.convert(tmp_path / "pipeline", tmp_path / "t")
    assert report.converted == len(made.state_dict())
    ours = load_tokenizer(tmp_path / "t")
    assert torch.equal(ours.decoder.conv_in.weight, made.decoder.conv_in.weight.float())


def test_a_missing_or_broken_config_is_named(tmp_path):
    peer((8, 16), 4, 4).save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for text, message in (("{", "is not JSON"), ("null", "is a NoneType in JSON, expected the settings of a")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            convert_diffusers.convert(tmp_path, tmp_path / "t")
    (tmp_path / "lone").mkdir()
    save_file(state, tmp_path / "lone" / "vae.safetensors")
    with pytest.raises(UserError, match="the latents' scale is in it"):
        convert_diffusers.convert(tmp_path / "lone" / "vae.safetensors", tmp_path / "t")
