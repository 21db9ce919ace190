"""The LDM autoencoder family: published sizes, the protocol, packing, save and load."""

import pytest
import torch

from aligntok.config import DecoderConfig
from aligntok.errors import UserError
from aligntok.models.tokenizer import load_strictly, load_tokenizer
from aligntok.zoo.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, flux_config


def tiny_config(packing: int = 1) -> AutoencoderKLConfig:
    network = DecoderConfig(base_channels=8, channel_multipliers=(1, 2), blocks=1, groups=4, attention_levels=(1,))
    return AutoencoderKLConfig(latent_channels=3, network=network, scale=0.5, shift=0.25, packing=packing)


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_published_sizes():
    with torch.device("meta"):
        flux, stable = AutoencoderKL(flux_config()), AutoencoderKL(AutoencoderKLConfig())
        latents = flux.raw_latents(torch.empty(1, 3, 256, 256))
    assert (millions(flux.encoder), millions(flux.decoder)) == pytest.approx((34.27, 49.55), abs=5e-3)
    assert millions(stable) == pytest.approx(83.654, abs=1e-3)
    assert latents.shape == (1, 64, 16, 16)
    assert (flux.latent_channels, flux.downsample, stable.latent_channels, stable.downsample) == (64, 16, 4, 8)


@torch.no_grad()
@pytest.mark.parametrize("packing", [1, 2])
def test_published_scale_and_shift_are_the_normalisation(packing):
    torch.manual_seed(0)
    tokenizer = AutoencoderKL(tiny_config(packing)).eval()
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    raw = tokenizer.raw_latents(images)
    assert raw.shape == (2, 3 * packing**2, 4 // packing, 6 // packing)
    latents = tokenizer.encode(images)
    torch.testing.assert_close(latents, 0.5 * (raw - 0.25))
    assert tokenizer.decode(latents).shape == images.shape
    torch.testing.assert_close(tokenizer.decode(latents), tokenizer.reconstruct(raw), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packing_puts_each_block_of_four_into_the_channels():
    """Channel c * 4 + row * 2 + column, as in FLUX's sampling code: "b c (h ph) (w pw) -> b (h w) (c ph pw)"."""
    torch.manual_seed(0)
    plain, packed = AutoencoderKL(tiny_config()).eval(), AutoencoderKL(tiny_config(2)).eval()
    packed.load_state_dict({k: v for k, v in plain.state_dict().items() if "latent_" not in k}, strict=False)
    images = torch.rand(1, 3, 16, 16)
    loose, dense = plain.raw_latents(images), packed.raw_latents(images)
    for c, row, column in [(0, 0, 1), (1, 1, 0), (2, 1, 1)]:
        assert torch.equal(dense[:, c * 4 + row * 2 + column], loose[:, c, row::2, column::2])
    assert torch.equal(packed.reconstruct(dense), plain.reconstruct(loose))


@torch.no_grad()
def test_save_and_load_give_the_same_bits(tmp_path):
    tokenizer = AutoencoderKL(tiny_config(2)).eval()
    tokenizer.set_statistics(torch.arange(12.0), torch.arange(12.0) + 1)
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.config == tokenizer.config


def test_fingerprint_follows_the_latents_and_not_the_decoder():
    tokenizer = AutoencoderKL(tiny_config())
    seen = {tokenizer.fingerprint()}
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.add_(1)
        tokenizer.post_quant.bias.add_(1)
        assert tokenizer.fingerprint() in seen
        tokenizer.quant.bias.add_(1)
        seen.add(tokenizer.fingerprint())
        tokenizer.latent_mean.add_(1)
        seen.add(tokenizer.fingerprint())
    assert len(seen) == 3


def test_refusals(tmp_path):
    tokenizer = AutoencoderKL(tiny_config())
    with pytest.raises(UserError, match="multiples of the downsampling 2"):
        tokenizer.encode(torch.zeros(1, 3, 8, 7))
    with pytest.raises(UserError, match=r"channels \[1\]"):
        tokenizer.set_statistics(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    text = file.read_text()
    file.write_text(text.replace("aligntok.zoo.autoencoder-kl", "something"))
    with pytest.raises(UserError, match="says format 'something'"):
        load_tokenizer(tmp_path / "t")
    file.write_text(text.replace('"latent_channels": 3', '"latent_channels": 5'))
    with pytest.raises(UserError, match="another configuration"):
        load_tokenizer(tmp_path / "t")
    state = tokenizer.state_dict() | {"latent_std": torch.full((3,), float("nan"))}
    load_strictly(tokenizer, state, tmp_path)
    with pytest.raises(UserError, match="aligntok statistics"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8))
