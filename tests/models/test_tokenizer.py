"""The tokenizer as everybody sees it: encode, decode, save, load, and what it refuses."""

import json

import pytest
import torch
from helpers import tiny_tokenizer

from aligntok.config import LightningDiTConfig, SamplerConfig
from aligntok.errors import UserError
from aligntok.models.generator import Generator, save_generator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer():
    made = tiny_tokenizer()
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        raw = made.raw_latents(images)
    made.set_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    return made


@torch.no_grad()
def test_encode_is_normalised_and_decode_is_its_inverse_scale(tokenizer):
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    latents = tokenizer.encode(images)
    assert latents.shape == (8, tokenizer.latent_channels, 4, 4)
    torch.testing.assert_close(tokenizer.denormalise(latents), tokenizer.raw_latents(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        tokenizer.decode(latents), tokenizer.decoder(tokenizer.raw_latents(images)), atol=1e-3, rtol=1e-3
    )


@torch.no_grad()
def test_non_square_images(tokenizer):
    latents = tokenizer.encode(torch.zeros(1, 3, 32, 80))
    assert latents.shape[-2:] == (2, 5)
    assert tokenizer.decode(latents).shape == (1, 3, 32, 80)


@torch.no_grad()
def test_save_and_load_give_the_same_bits(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_fingerprint_follows_the_latents_and_not_the_decoder(tokenizer):
    before = tokenizer.fingerprint()
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.add_(1)
    assert tokenizer.fingerprint() == before
    with torch.no_grad():
        tokenizer.adapter.projection.bias.add_(1e-3)
    assert tokenizer.fingerprint() != before


def test_without_statistics_nothing_is_encoded_and_the_remedy_is_named(tmp_path):
    bare = tiny_tokenizer()
    with pytest.raises(UserError, match="aligntok statistics"):
        bare.encode(torch.zeros(1, 3, 64, 64))
    bare.save(tmp_path / "t")
    with pytest.raises(UserError, match="aligntok statistics"):
        load_tokenizer(tmp_path / "t")
    assert not load_tokenizer(tmp_path / "t", require_statistics=False).has_statistics


def test_constant_channels_are_refused_as_statistics(tokenizer):
    std = torch.ones(tokenizer.latent_channels)
    std[3] = 0
    with pytest.raises(UserError, match=r"channels \[3\]"):
        tokenizer.set_statistics(torch.zeros_like(std), std)


def test_a_size_that_f_does_not_divide_is_refused(tokenizer):
    with pytest.raises(UserError, match="not a multiple"):
        tokenizer.encode(torch.zeros(1, 3, 60, 64))


def test_weights_of_another_configuration_are_refused_by_name(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["adapter"]["latent_channels"] += 8
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"another configuration.*adapter\.projection\.weight \["):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="something"), "expected 'aligntok.tokenizer'"),
        (lambda m: m.update(format=["aligntok.tokenizer"]), "expected 'aligntok.tokenizer'"),
        (lambda m: m.pop("format"), "expected 'aligntok.tokenizer'"),
        (lambda m: m.update(version=2), "is of version 2, this package reads version 1"),
        (lambda m: m.pop("version"), "lacks 'version'"),
        (lambda m: m.pop("config"), "lacks 'config'"),
        (lambda m: m.update(config=3), "config is 3, expected settings"),
        (lambda m: m["config"]["encoder"].update(laier=3), "did you mean 'encoder.layer'"),
        (lambda m: m["config"].update(encoder="large"), "config.encoder is 'large', expected settings"),
        (lambda m: m["config"]["adapter"].update(latent_channels="x"), "adapter.latent_channels is 'x', expected int"),
        (lambda m: m["config"]["adapter"].update(latent_channels=True), "adapter.latent_channels is True, expected"),
        (lambda m: m["config"]["adapter"].update(latent_channels=-8), "no network has these sizes"),
        (lambda m: m["config"]["adapter"].update(kind="cnn"), "adapter.kind is 'cnn', expected Literal"),
        (lambda m: m["config"]["decoder"].update(attention_levels=[0.5]), r"is \[0.5\], expected tuple"),
        (lambda m: m["config"]["decoder"].update(groups=7), "multiples of decoder.groups = 7"),
    ],
)
def test_other_manifests_are_refused(tokenizer, tmp_path, change, message):
    tokenizer.save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(tmp_path / "t")
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("config.json", b"{", "cannot be read as JSON"),
        ("config.json", b"\xff\xfe", "cannot be read as JSON"),
        ("config.json", b"[1]", "is a list in JSON, expected an object"),
        ("model.safetensors", b"\x08", "cannot be read .*damaged or incomplete"),
        ("model.safetensors", None, "there is no file"),
    ],
)
def test_damaged_files_are_named(tokenizer, tmp_path, name, data, message):
    tokenizer.save(tmp_path / "t")
    file = tmp_path / "t" / name
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(tmp_path / "t")
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)


def test_truncated_weights_are_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    file = tmp_path / "t" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .*damaged or incomplete"):
        load_tokenizer(tmp_path / "t")


def test_a_generators_folder_does_not_become_a_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    file.write_text(file.read_text().replace("aligntok.tokenizer", "aligntok.generator"))
    with pytest.raises(UserError, match=r"says format 'aligntok\.generator'"):
        tokenizer.save(tmp_path / "t")


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_tokenizer(tmp_path)


def test_a_generator_that_does_not_say_how_many_classes_it_knows_is_refused(tmp_path):
    config = LightningDiTConfig(size="custom", depth=1, width=32, heads=2, classes=2)
    model = LightningDiT(config, 8, (2, 2))
    save_generator(tmp_path, model, model.state_dict(), SamplerConfig(), ["a", "b"], "0")
    file = tmp_path / "config.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["classes"] = None
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"config\.json: config\.classes is null, expected the number of classes"):
        Generator(tmp_path)
