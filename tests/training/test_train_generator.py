"""A generator's folder: what is read back, and what a damaged one is answered with."""

import json

import pytest
import torch

from aligntok.config import LightningDiTConfig, SamplerConfig
from aligntok.errors import UserError
from aligntok.models.generator import Generator, save_generator
from aligntok.models.lightning_dit import LightningDiT


@pytest.fixture
def folder(tmp_path):
    config = LightningDiTConfig(size="custom", depth=1, width=16, heads=2, classes=2)
    model, place = LightningDiT(config, 3, (2, 4)), tmp_path / "generator"
    save_generator(place, model, model.state_dict(), SamplerConfig(steps=7, guidance=2), ["a", "b"], "0123")
    return place


def test_everything_comes_back(folder):
    found = Generator(folder)
    assert found.latent_shape == (3, 2, 4) and found.classes == ["a", "b"] and found.tokenizer_fingerprint == "0123"
    assert found.sampler == SamplerConfig(steps=7, guidance=2)
    assert found.model(torch.zeros(1, 3, 2, 4), torch.ones(1), torch.tensor([0])).shape == (1, 3, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="aligntok.tokenizer"), "says format 'aligntok.tokenizer', expected"),
        (lambda m: m.update(version="1"), "version is '1', expected int"),
        (lambda m: m.update(version=9), "is of version 9"),
        (lambda m: m.pop("latent_size"), "lacks 'latent_size'"),
        (lambda m: m.update(latent_size=[2]), r"latent_size is \[2\], expected tuple"),
        (lambda m: m.update(latent_channels="x"), "latent_channels is 'x', expected int"),
        (lambda m: m.update(classes=[1, 2]), r"classes is \[1, 2\], expected list"),
        (lambda m: m.pop("sampler"), "lacks 'sampler'"),
        (lambda m: m["sampler"].update(guidance_interval=[0.0]), "sampler.guidance_interval is"),
        (lambda m: m["sampler"].update(solver="magic"), "sampler.solver is 'magic'"),
        (lambda m: m["config"].update(width=None), "give depth, width and heads"),
        (lambda m: m["config"].update(heads=0), "no network has these sizes"),
    ],
)
def test_faults_of_the_manifest_are_one_line_that_names_the_file(folder, change, message):
    file = folder / "config.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message) as raised:
        Generator(folder)
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_files_are_named(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="cannot be read") as raised:
        Generator(folder)
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)
