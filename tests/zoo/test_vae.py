"""The VAE as a tokenizer: sizes, posterior, folder."""

import dataclasses
import math

import pytest
import torch
from zoo_rivals import tiny_vae

from aligntok.config import DecoderConfig, VAEConfig
from aligntok.errors import UserError
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.weights import load_strictly
from aligntok.zoo.converters.flux import flux_config
from aligntok.zoo.vae import VAE, Posterior, scale_and_shift


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_published_size():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
        assert vae.posterior(torch.empty(1, 3, 256, 256)).mean.shape == (1, 32, 16, 16)
        assert vae.reconstruct(torch.empty(1, 32, 16, 16)).shape == (1, 3, 256, 256)
    # VA-VAE: encoder 28.41 M, decoder 41.42 M, 1x1 convolutions of 4,160 and 1,056
    parts = [millions(part) for part in (vae.encoder, vae.decoder, vae.quant, vae.post_quant)]
    assert parts == pytest.approx([28.4132, 41.4176, 0.004160, 0.001056], abs=1e-4)


def test_published_size_of_flux():
    with torch.device("meta"):
        flux = VAE(flux_config())
        latents = flux.raw_latents(torch.empty(1, 3, 256, 256))
    assert (millions(flux.encoder), millions(flux.decoder)) == pytest.approx((34.27, 49.55), abs=5e-3)
    assert millions(flux) == pytest.approx(millions(flux.encoder) + millions(flux.decoder))
    assert latents.shape == (1, 64, 16, 16) and (flux.latent_channels, flux.downsample) == (64, 16)


def test_vit_encoder_is_that_of_the_paper():
    with torch.device("meta"):
        vae = VAE(VAEConfig(encoder="vit"))
    assert millions(vae.encoder.vit) == pytest.approx(304.37, abs=5e-3)
    assert millions(vae.encoder.projection) == pytest.approx((1024 * 64 + 64) / 1e6)


def test_posterior():
    posterior = Posterior(torch.full((2, 3, 4, 5), 2.0), torch.full((2, 3, 4, 5), math.log(0.25)))
    analytic = torch.distributions.kl_divergence(
        torch.distributions.Normal(2.0, 0.5), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(posterior.kl(), (60 * analytic).expand(2))
    torch.manual_seed(0)
    samples = torch.stack([posterior.sample() for _ in range(400)])
    assert samples.mean() == pytest.approx(2, abs=0.02) and samples.std() == pytest.approx(0.5, abs=0.02)


def packed_vae() -> VAEConfig:
    """f4 after packing, 12 channels."""
    networks = DecoderConfig(base_channels=8, channel_multipliers=(1, 2), blocks=1, groups=4, attention_levels=(1,))
    return VAEConfig(latent_channels=3, networks=networks, quant_convs=False, packing=2)


@torch.no_grad()
def test_packing_puts_each_block_of_four_into_the_channels():
    """Channel c * 4 + row * 2 + column, as in FLUX's sampling code: "b c (h ph) (w pw) -> b (h w) (c ph pw)"."""
    torch.manual_seed(0)
    packed, plain = VAE(packed_vae()).eval(), VAE(dataclasses.replace(packed_vae(), packing=1)).eval()
    packed.load_state_dict({k: v for k, v in plain.state_dict().items() if "latent_" not in k}, strict=False)
    images = torch.rand(1, 3, 16, 16)
    loose, dense = plain.raw_latents(images), packed.raw_latents(images)
    for c, row, column in [(0, 0, 1), (1, 1, 0), (2, 1, 1)]:
        assert torch.equal(dense[:, c * 4 + row * 2 + column], loose[:, c, row::2, column::2])
    assert torch.equal(packed.reconstruct(dense), plain.reconstruct(loose))


@torch.no_grad()
def test_published_scale_and_shift_are_the_normalisation():
    torch.manual_seed(0)
    vae, images = VAE(packed_vae()).eval(), torch.rand(2, 3, 8, 12) * 2 - 1
    assert not vae.has_statistics
    scale_and_shift(vae, 0.5, 0.25)
    torch.testing.assert_close(vae.encode(images), 0.5 * (vae.raw_latents(images) - 0.25))


@pytest.mark.parametrize("config", [tiny_vae("cnn"), tiny_vae("vit"), packed_vae()], ids=["cnn", "vit", "packed"])
@torch.no_grad()
def test_folder_gives_the_same_bits_back(config, tmp_path):
    torch.manual_seed(0)
    vae, images = VAE(config).eval(), torch.rand(2, 3, 32, 48) * 2 - 1
    d, f = vae.latent_channels, vae.downsample
    vae.set_statistics(torch.randn(d), torch.rand(d) + 0.5)
    vae.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.config == vae.config
    latents = vae.encode(images)
    assert latents.shape == (2, d, 32 // f, 48 // f) and vae.decode(latents).shape == images.shape
    assert torch.equal(loaded.encode(images), latents) and torch.equal(loaded.decode(latents), vae.decode(latents))
    assert loaded.fingerprint() == vae.fingerprint()
    torch.testing.assert_close(vae.denormalise(latents), vae.posterior(images).mean)


def test_fingerprint_follows_the_encoder_alone():
    vae = VAE(tiny_vae())
    before = vae.fingerprint()
    with torch.no_grad():
        vae.post_quant.bias.add_(1)
    assert vae.fingerprint() == before
    with torch.no_grad():
        vae.quant.bias.add_(1)
    assert vae.fingerprint() != before


def test_refusals():
    with pytest.raises(UserError, match="multiple of the downsampling 16"):
        VAE(tiny_vae()).posterior(torch.zeros(1, 3, 32, 40))
    with pytest.raises(UserError, match=r"vae\.packing is 0"):
        VAE(dataclasses.replace(packed_vae(), packing=0))
    config = tiny_vae("vit")
    config.networks.channel_multipliers = (1, 1, 2)
    with pytest.raises(UserError, match="enlarges 4x"):
        VAE(config)
    config = tiny_vae()
    config.networks.blocks = 0
    with pytest.raises(UserError, match="at least 1 block"):
        VAE(config)


def test_folders_that_do_not_fit(tmp_path):
    vae = VAE(packed_vae())
    with pytest.raises(UserError, match=r"channels \[1\]"):
        vae.set_statistics(torch.zeros(12), torch.tensor([1.0, 0.0] + [1.0] * 10))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_tokenizer(tmp_path)
    scale_and_shift(vae, 0.5, 0.25)
    vae.save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"aligntok.zoo.vae"', '"something"'))
    with pytest.raises(UserError, match="says format 'something'"):
        load_tokenizer(tmp_path / "t")
    file.write_text(text.replace('"latent_channels": 3', '"latent_channels": 5'))
    with pytest.raises(UserError, match="another configuration"):
        load_tokenizer(tmp_path / "t")
    state = vae.state_dict() | {"latent_std": torch.full((12,), float("nan"))}
    load_strictly(vae, state, tmp_path)
    with pytest.raises(UserError, match="aligntok statistics"):
        vae.encode(torch.zeros(1, 3, 8, 8))
