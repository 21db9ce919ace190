"""Tokenizers and generators whose weights are cast to bf16 or fp16: they encode, decode, draw and know each other."""

import copy

import pytest
import torch
from helpers import tiny_tokenizer
from zoo_rivals import tiny_maetok, tiny_rae, tiny_vae

import aligntok
from aligntok.config import LightningDiTConfig, SamplerConfig
from aligntok.models.generator import Generator, generator_class, save_generator
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.zoo.maetok import MAETok
from aligntok.zoo.rae import RAE
from aligntok.zoo.vae import VAE

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one number
MADE = {
    "aligntok": tiny_tokenizer,
    "vae": lambda: VAE(tiny_vae()),
    "vae with a ViT": lambda: VAE(tiny_vae("vit")),
    "rae": lambda: RAE(tiny_rae()),
    "maetok": lambda: MAETok(tiny_maetok()),
}


def tokenizer(name: str) -> StoredTokenizer:
    torch.manual_seed(0)
    made = MADE[name]().eval()
    made.set_statistics(torch.full_like(made.latent_mean, 0.1), torch.full_like(made.latent_std, 0.7))
    return made


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Within what rounding every intermediate result comes to: some tens of roundings of the largest number."""
    return bool((found - expected).abs().max() < 30 * ROUNDING[dtype] * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_tokenizers(name, dtype):
    whole = tokenizer(name)
    half = copy.deepcopy(whole).to(dtype)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = whole.encode(images)
    for given in (images, images.to(dtype)):
        found = half.encode(given)
        assert found.dtype == torch.float32 and near(found, latents, dtype)
    for given in (latents, latents.to(dtype)):
        found = half.decode(given)
        assert found.dtype == torch.float32 and near(found, whole.decode(latents), dtype)
    assert half.fingerprint() == whole.fingerprint()
    assert torch.equal(half.latent_mean, whole.latent_mean), "statistics are not rounded"


def test_a_cast_back_is_another_tokenizer():
    """Its weights have lost their last bits for good, and a generator's check must notice."""
    whole = tokenizer("aligntok")
    assert copy.deepcopy(whole).half().float().fingerprint() != whole.fingerprint()
    assert copy.deepcopy(whole).float().fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("head", [0, 1], ids=["LightningDiT", "DiT^DH"])
def test_generators_draw_what_they_draw_in_float32(head, dtype, tmp_path):
    tok = tokenizer("aligntok")
    sizes = {"depth": 1, "width": 32, "heads": 2, "head_depth": head, "head_width": 64, "head_heads": 2}
    config = LightningDiTConfig(size="custom", classes=3, **sizes)
    torch.manual_seed(1)
    model = generator_class(config)(config, 8, (2, 2))
    with torch.no_grad():
        for parameter in model.parameters():  # modulations and output start at zero, and nothing would be drawn
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_generator(tmp_path, model, model.state_dict(), SamplerConfig(steps=4), ["a", "b", "c"], tok.fingerprint())
    labels, precision = torch.tensor([0, 2]), aligntok.choose_precision("cpu", "fp32")
    whole, half = Generator(tmp_path), Generator(tmp_path)
    half.model.to(dtype)
    expected = aligntok.draw(whole, tok, labels, whole.sampler, precision, seed=3)
    found = aligntok.draw(half, copy.deepcopy(tok).to(dtype), labels, half.sampler, precision, seed=3)
    assert found.dtype == torch.float32 and near(found, expected, dtype)
    if head:
        frequencies = half.model.time.frequencies
        assert frequencies.dtype == torch.float32 and torch.equal(frequencies, whole.model.time.frequencies)
