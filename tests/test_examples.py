"""The examples, each run as its reader would run it, on a tokenizer of a few thousand weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer, write_pictures
from safetensors import safe_open

from aligntok.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, pictures, and a cache of their latents."""
    made = tmp_path_factory.mktemp("examples")
    write_pictures(made / "pictures", 8)
    tokenizer = tiny_tokenizer()
    tokenizer.set_statistics(torch.zeros(8), torch.ones(8))
    tokenizer.save(made / "tokenizer")
    return made


def _run(name: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_encode_folder(folder):
    told = _run("encode_folder.py", folder, "tokenizer", "pictures", "latents.safetensors", "--size", "32")
    assert "8 latents of [8, 2, 2]; PSNR through them" in told
    with safe_open(folder / "latents.safetensors", "pt") as file:
        assert file.get_tensor("latents").shape == (8, 8, 2, 2)
        assert file.metadata() == {"tokenizer": tiny_fingerprint(folder)}


def tiny_fingerprint(folder: Path) -> str:
    from aligntok import load_tokenizer

    return load_tokenizer(folder / "tokenizer").fingerprint()


def test_own_generator(folder):
    place = ("--tokenizer", str(folder / "tokenizer"), "--images", str(folder / "pictures"))
    cache = ("--output", str(folder / "cache"), "--image_size", "32", "--workers", "0", "--precision", "fp32")
    assert main(["cache-latents", *place, *cache]) == 0
    told = _run("own_generator.py", folder, "cache", "tokenizer", "drawn.png", "--steps", "3", "--batch", "4")
    assert "one picture for each of 2 classes" in told and (folder / "drawn.png").stat().st_size


def test_fused_operator(folder):
    told = _run("fused_operator.py", folder)
    difference = float(told.rpartition(":")[2])
    assert "adaln on " in told and "swiglu on " in told and difference < 1e-5


def test_another_encoder(folder):
    assert "encoder: 304.37 M" in _run("another_encoder.py", folder, "vit_large_patch14_dinov2.lvd142m")
    small = ("vit_tiny_patch16_224.augreg_in21k", "--weights", "random", "--channels", "8", "--steps", "1")
    _run("another_encoder.py", folder, *small, "--train", "pictures")
    config = json.loads((folder / "runs" / "another_encoder" / "tokenizer" / "config.json").read_text())["config"]
    assert config["encoder"]["name"].startswith("vit_tiny") and config["adapter"]["latent_channels"] == 8


def test_another_loss(folder):
    _run("another_loss.py", folder, "--images", "pictures", "--steps", "2", "--output", "edges")
    records = [json.loads(line) for line in (folder / "edges" / "metrics.jsonl").read_text().splitlines()]
    values = [record for record in records if "edges" in record]
    assert values and all(record["edges"] > 0 for record in values)


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {file.name for file in EXAMPLES.glob("*.py")} <= tested
