"""What version 0.1.0 wrote before the package was laid out anew: folders, a latent cache and checkpoints still serve.

`written_before/` holds a run of `recipe` below, made at commit eb59d91: a tokenizer (fingerprint d4e95ab5fe44a4f5), a
generator, a rival's VAE, a latent cache, checkpoints of Stage 1 and of the generator that were interrupted after three
of four steps, and in expected.safetensors what the networks gave.
"""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe, write_pictures
from safetensors.torch import load_file
from torch.testing import assert_close

import aligntok
from aligntok.config import AdapterConfig, DecoderConfig, EncoderConfig, Recipe, TokenizerConfig
from aligntok.data.latent_cache import LatentCache
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining

BEFORE = Path(__file__).parent / "written_before"
NEAR = {"rtol": 1e-4, "atol": 1e-4}  # another processor rounds otherwise


def recipe(folder: Path) -> Recipe:
    made = tiny_recipe(folder, Path("pictures"))
    made.tokenizer.model = TokenizerConfig(
        encoder=EncoderConfig(name="test_vit.r160_in1k", weights="random", layer=0),
        adapter=AdapterConfig(kind="linear", latent_channels=4),
        decoder=DecoderConfig(base_channels=4, channel_multipliers=(1, 1, 1, 1, 2), blocks=0, groups=2),
    )
    return made


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(BEFORE / "expected.safetensors")


@torch.no_grad()
def test_tokenizers_and_generator_give_what_they_gave(expected):
    tokenizer = aligntok.load_tokenizer(BEFORE / "tokenizer")
    assert tokenizer.fingerprint() == "d4e95ab5fe44a4f5"
    assert_close(tokenizer.encode(expected["images"]), expected["latents"], **NEAR)
    assert_close(tokenizer.decode(expected["latents"]), expected["reconstructions"], **NEAR)
    vae = aligntok.load_tokenizer(BEFORE / "vae")
    assert_close(vae.encode(expected["images"]), expected["vae_latents"], **NEAR)
    assert_close(vae.decode(expected["vae_latents"]), expected["vae_reconstructions"], **NEAR)
    generator = aligntok.Generator(BEFORE / "generator")
    precision = aligntok.choose_precision("cpu", "fp32")
    samples = aligntok.draw(generator, tokenizer, torch.tensor([0, 1]), generator.sampler, precision, seed=0)
    assert_close(samples, expected["samples"], **NEAR)


def test_latent_cache_belongs_to_its_tokenizer():
    cache = LatentCache(BEFORE / "latents", aligntok.load_tokenizer(BEFORE / "tokenizer").fingerprint(), "")
    assert cache.origin.classes == ["disc", "square"]
    assert len(cache.training_numbers(recipe(Path("unused")).data)) == 8


@pytest.mark.parametrize("part", ["stage1", "generator"])
def test_interrupted_training_goes_on(part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("pictures"), 10)
    shutil.copytree(BEFORE / "checkpoints", "run/checkpoints")
    if part == "stage1":
        TokenizerTraining(recipe(Path("run"))).run()
    else:
        shutil.copytree(BEFORE / "tokenizer", "run/tokenizer")
        train_generator(recipe(Path("run")))
        trained, before = (load_file(folder / "generator/model.safetensors") for folder in (Path("run"), BEFORE))
        assert trained.keys() == before.keys()
        for name in before:
            assert_close(trained[name], before[name], **NEAR)
    assert f"{part}: resumed at step 3 of 4" in capsys.readouterr().err
