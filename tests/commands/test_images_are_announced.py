"""Every command that reads images says at its start how many it found, uses and leaves out, and why."""

import shutil
from pathlib import Path

import pytest
from helpers import tiny_recipe, write_pictures
from zoo_rivals import rival_recipe

from aligntok.cli import main
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import train_tokenizer
from aligntok.zoo.train_rival import train_rival

TOKENIZER = str(Path(__file__).parents[1] / "written_before/tokenizer")
SAID = "WARNING: images: pictures: 24 found, 20 used, 4 left out"
WHY = "  4 hidden or a tool's: .ipynb_checkpoints/"

COMMANDS = {
    "reconstruct": ["--image_size", "32", "--output", "out.png"],
    "statistics": ["--image_size", "32"],
    "cache-latents": ["--image_size", "32", "--output", "cache", "--workers", "0"],
    "evaluate reconstruction": ["--image_size", "32", "--perceptual", "none"],
    "evaluate probe": ["--image_size", "32"],
}


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """20 pictures in two classes, and four that a notebook keeps."""
    monkeypatch.chdir(tmp_path)
    folder = write_pictures(tmp_path / "pictures", 20)
    shutil.copytree(folder / "disc", folder / ".ipynb_checkpoints")
    for file in sorted((folder / ".ipynb_checkpoints").iterdir())[4:]:
        file.unlink()
    return folder


def announced(text: str) -> bool:
    return SAID in text and WHY in text


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, pictures, tmp_path, capsys):
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    arguments = [*command.split(), "--tokenizer", "tokenizer", "--images", "pictures", *COMMANDS[command]]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert announced(captured.out + captured.err)


@pytest.mark.parametrize("trained", ["tokenizer", "generator", "rival"])
def test_training(trained, pictures, tmp_path, capsys):
    if trained == "rival":
        train_rival(rival_recipe(tmp_path / "run", pictures, "vae"))
    elif trained == "tokenizer":
        train_tokenizer(tiny_recipe(tmp_path / "run", pictures, stage2={"steps": 0}, stage3={"steps": 0}))
    else:
        shutil.copytree(TOKENIZER, tmp_path / "run/tokenizer")
        train_generator(tiny_recipe(tmp_path / "run", pictures))
    assert announced(capsys.readouterr().err)
