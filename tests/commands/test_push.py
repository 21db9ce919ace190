"""Repositories on the hub: pushed by the real command, and taken where a folder is asked for. The hub is a stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer
from hub_stand_in import Hub, hub_stand_in
from torch import nn

from aligntok.cli import main
from aligntok.commands.push import card_of
from aligntok.config import LightningDiTConfig, SamplerConfig
from aligntok.config.options import PushConfig
from aligntok.errors import UserError
from aligntok.models.generator import build_network, save_generator
from aligntok.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def hub():
    with hub_stand_in() as made:
        yield made


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A tokenizer and a generator, of random weights."""
    folder = tmp_path_factory.mktemp("folders")
    tokenizer = tiny_tokenizer()
    tokenizer.set_statistics(torch.zeros(8), torch.ones(8))
    tokenizer.save(folder / "tokenizer")
    network = build_network(LightningDiTConfig(size="custom", depth=1, width=32, heads=2, classes=2), 8, (2, 2), None)
    nn.init.normal_(network.final.linear.weight, std=0.2)
    weights, names = network.state_dict(), ["disc", "square"]
    save_generator(folder / "generator", network, weights, SamplerConfig(steps=2), names, tokenizer.fingerprint())
    return folder


def _run(hub: Hub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """The command in a process whose hub is the stand-in."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": "hf_stand_in", "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, "-m", "aligntok", *arguments]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)


def test_what_is_pushed_is_taken_by_name(hub, folders, tmp_path):
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"reconstruction": {"values": {"PSNR": 21.5}, "protocol": "n=3, 32 px"}}))
    card = ("--data", "three discs", "--license", "mit", "--metrics", f'["{metrics}"]')
    done = _run(hub, tmp_path, "push", str(folders / "tokenizer"), "me/discs", "--private", "true", *card)
    assert done.returncode == 0 and "is me/discs on the hub" in done.stdout, done.stderr
    assert hub.private["me/discs"] and set(hub.repositories["me/discs"]["main"]) == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    told = hub.repositories["me/discs"]["main"]["README.md"].decode()
    assert "license: mit" in told and "Trained on three discs." in told and "| PSNR | 21.5000 |" in told
    assert "n=3, 32 px" in told and 'load_tokenizer("me/discs")' in told

    done = _run(hub, tmp_path, "push", str(folders / "generator"), "me/drawn", "--revision", "v2")
    assert done.returncode == 0 and not hub.repositories["me/drawn"]["main"], done.stderr
    drawing = ("sample", "--seed", "3", "--per_class", "1", "--device", "cpu", "--output")
    named = _run(hub, tmp_path, *drawing, "hub.png", "--tokenizer", "me/discs", "--generator", "me/drawn@v2")
    assert named.returncode == 0, named.stderr
    here = ("--tokenizer", str(folders / "tokenizer"), "--generator", str(folders / "generator"))
    assert main([*drawing, str(tmp_path / "here.png"), *here]) == 0
    assert (tmp_path / "hub.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    # what has been fetched is there without a network
    hub.asked.clear()
    offline = _run(hub, tmp_path, *drawing, "off.png", "--tokenizer", "me/discs", *here[2:], HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and not hub.asked, offline.stderr


def test_a_folder_of_the_same_name_comes_first(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "unknown").symlink_to(folders / "tokenizer")
    assert load_tokenizer("me/unknown").latent_channels == 8
    with pytest.raises(UserError, match=r"no tokenizer at a/b/c: config\.json is missing"):
        load_tokenizer("a/b/c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{tokenizer}", "nowhere"), "'nowhere' is no name of a repository: expected USER/NAME"),
        (("{tokenizer}",), "give FOLDER USER/NAME"),
        (("{tokenizer}/none", "me/x"), "config.json is missing"),
        (("{tokenizer}", "me/x", "--metrics", '["{tokenizer}/config.json"]'), "cannot be read"),
        (("{tokenizer}", "me/x", "--metrics", '["{tokenizer}/none.json"]'), "cannot be read"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_sent(folders, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("the hub was asked"))
    filled = [word.replace("{tokenizer}", str(folders / "tokenizer")) for word in arguments]
    assert main(["push", *filled]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1, told


def test_a_refusal_of_the_hub_and_no_network_are_one_line(hub, folders, tmp_path):
    done = _run(hub, tmp_path, "sample", "--tokenizer", "me/nothing", "--generator", "me/nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "no generator at me/nothing: there is no such folder, and no repository of that name" in done.stderr
    push = ("push", str(folders / "tokenizer"), "me/refused")
    for change in ({"HF_TOKEN": "hf_another"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = _run(hub, tmp_path, *push, **change)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "me/refused could not be written to the hub" in done.stderr and "HF_TOKEN" in done.stderr


def test_the_card_of_a_generator_names_what_it_can_be_asked_for(folders, tmp_path):
    told = card_of(PushConfig(str(folders / "generator"), "me/drawn"))
    assert "2 classes (disc, square)" in told and "license" not in told and "## Data" not in told


def test_help_names_the_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    assert "FOLDER USER/NAME" in capsys.readouterr().out
