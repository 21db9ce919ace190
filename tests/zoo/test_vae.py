"""The VAE as a tokenizer: sizes, posterior, folder."""

import math

import pytest
import torch
from zoo_rivals import tiny_vae

from aligntok.config import VAEConfig
from aligntok.errors import UserError
from aligntok.models.tokenizer import load_tokenizer
from aligntok.zoo.vae import VAE, Posterior


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


@pytest.mark.parametrize("encoder", ["cnn", "vit"])
@torch.no_grad()
def test_folder_gives_the_same_bits_back(encoder, tmp_path):
    torch.manual_seed(0)
    vae, images = VAE(tiny_vae(encoder)).eval(), torch.rand(2, 3, 32, 48) * 2 - 1
    vae.set_statistics(torch.randn(4), torch.rand(4) + 0.5)
    vae.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    latents = vae.encode(images)
    assert latents.shape == (2, 4, 2, 3) and vae.decode(latents).shape == images.shape
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
    config = tiny_vae("vit")
    config.networks.channel_multipliers = (1, 1, 2)
    with pytest.raises(UserError, match="enlarges 4x"):
        VAE(config)
    config = tiny_vae()
    config.networks.blocks = 0
    with pytest.raises(UserError, match="at least 1 block"):
        VAE(config)
