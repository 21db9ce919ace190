"""Whether the tokenizer of a folder is the one that a recipe asks for."""

import json

import pytest
import torch
from safetensors.torch import save_file
from zoo_rivals import tiny_maetok, tiny_rae, tiny_vae

from aligntok.config import RepaEConfig, RivalConfig
from aligntok.errors import UserError
from aligntok.models.tokenizer import load_tokenizer
from aligntok.zoo.finished import check_finished
from aligntok.zoo.rae import RAE
from aligntok.zoo.train_rival import build_rival


def rival(kind: str, encoder: str = "cnn", **more) -> RivalConfig:
    return RivalConfig(kind=kind, vae=tiny_vae(encoder), rae=tiny_rae(), maetok=tiny_maetok(), **more)


@pytest.mark.parametrize("kind", ["vae", "va-vae", "rae", "maetok", "repa-e"])
def test_the_same_again_is_accepted(kind, tmp_path):
    build_rival(rival(kind)).save(tmp_path / "t")
    check_finished(tmp_path / "t", rival(kind))


def test_the_weights_that_the_encoder_started_with_count(tmp_path):
    """Loading makes them "random" in the configuration, so the file is what is compared."""
    build_rival(rival("rae")).save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["encoder"]["weights"] = "pretrained"
    file.write_text(json.dumps(manifest))
    asked = rival("rae")
    with pytest.raises(UserError, match=r"encoder\.weights is 'pretrained' there, 'random' was asked for"):
        check_finished(tmp_path / "t", asked)
    asked.rae.encoder.weights = "pretrained"
    check_finished(tmp_path / "t", asked)


def test_one_file_of_weights_may_be_written_in_two_ways(tmp_path, monkeypatch):
    made = build_rival(rival("rae"))
    save_file(made.encoder.backbone.state_dict(), tmp_path / "w.safetensors")
    made.config.encoder.weights = str(tmp_path / "w.safetensors")
    made.save(tmp_path / "t")
    monkeypatch.chdir(tmp_path)
    asked = rival("rae")
    asked.rae.encoder.weights = "w.safetensors"
    check_finished(tmp_path / "t", asked)
    (tmp_path / "other.safetensors").write_bytes(b"")
    asked.rae.encoder.weights = "other.safetensors"
    with pytest.raises(UserError, match=r"encoder\.weights is '.*w\.safetensors' there, '.*other\.safetensors' was"):
        check_finished(tmp_path / "t", asked)


def test_a_tokenizer_that_was_read_and_saved_again_is_still_the_same(tmp_path):
    """As `aligntok statistics` does; its configuration then says that the encoder is random."""
    made = RAE(tiny_rae())
    made.set_statistics(torch.zeros_like(made.latent_mean), torch.ones_like(made.latent_std))
    made.save(tmp_path / "t")
    load_tokenizer(tmp_path / "t").save(tmp_path / "t")
    asked = rival("rae")
    asked.rae.encoder.weights = "pretrained"
    check_finished(tmp_path / "t", asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (rival("rae"), "holds a finished aligntok.zoo.vae, and rival.kind rae makes aligntok.zoo.rae"),
        (rival("vae", "vit"), "encoder is 'cnn' there, 'vit' was asked for"),
        (rival("repa-e", "vit"), "encoder is 'cnn' there, 'vit' was asked for"),
    ],
)
def test_another_one_is_refused_with_both_told(asked, message, tmp_path):
    build_rival(rival("vae")).save(tmp_path / "t")
    with pytest.raises(UserError, match=message + ".*give another --output") as raised:
        check_finished(tmp_path / "t", asked)
    assert "\n" not in str(raised.value)


def test_of_a_given_tokenizer_only_the_format_counts(tmp_path):
    build_rival(rival("vae")).save(tmp_path / "t")
    check_finished(tmp_path / "t", rival("repa-e", "vit", repa_e=RepaEConfig(tokenizer="elsewhere")))
    build_rival(rival("maetok")).save(tmp_path / "m")
    with pytest.raises(UserError, match=r"finished aligntok\.zoo\.maetok"):
        check_finished(tmp_path / "m", rival("repa-e", repa_e=RepaEConfig(tokenizer="elsewhere")))
