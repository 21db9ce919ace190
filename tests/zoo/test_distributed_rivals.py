"""Two processes train the rival that one trains: its noise, posterior samples and adaptive weights included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import write_pictures
from safetensors.torch import load_file
from zoo_rivals import KINDS, rival_recipe

from aligntok.errors import UserError
from aligntok.training import distributed
from aligntok.zoo.train_rival import train_rival

LIMIT = 240  # seconds: much more than it takes, other work may slow it down


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of all kinds, trained in one process and in two."""
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("runs")
    pictures = write_pictures(folder / "pictures", 20)
    paths = os.pathsep.join([str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(here / "two_processes.py"), str(pictures), str(folder / "two")]
    with open(folder / "output.txt", "w") as output:
        environment = os.environ | {"PYTHONPATH": paths}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    for kind in KINDS:
        train_rival(rival_recipe(folder / "one" / kind, pictures, kind))
    try:
        process.wait(timeout=LIMIT)
    finally:
        process.terminate()  # torchrun takes its processes along
    assert process.returncode == 0, (folder / "output.txt").read_text()[-3000:]
    return folder / "one", folder / "two"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the tokenizer and, where there is one, the generator."""
    files = sorted(folder.glob("*/model.safetensors"))
    return {f"{file.parent.name}/{k}": v for file in files for k, v in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(runs, kind):
    logs = [[json.loads(line) for line in (run / kind / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert len(logs[0]) == len(logs[1]) == 4
    compared = {"l1", "kl", "alignment", "alignment_weight", "latent_std", "gan", "gan_weight", "discriminator"}
    compared |= {"hog", "dino", "align_tokenizer", "align_generator", "mse"}
    for one, two in zip(*logs, strict=True):
        names = compared & one.keys()
        assert {name: two[name] for name in names} == pytest.approx({n: one[n] for n in names}, rel=5e-4, abs=3e-6)
    states = [weights(run / kind) for run in runs]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        difference = (states[1][name] - value).abs()
        # Adam turns the rounding of a gradient near 0 into a step of another sign: a few weights may differ by steps
        assert difference.max() < 4e-3 * max(1, value.abs().max()) and difference.mean() < 5e-5, name


def test_shares_of_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_sharded", lambda mode: mode == "fsdp")
    recipe = rival_recipe(tmp_path, write_pictures(tmp_path / "pictures", 4), "vae")
    recipe.rival.training.parallel = "fsdp"
    with pytest.raises(UserError, match=r"rival\.training\.parallel to ddp"):
        train_rival(recipe)
    assert torch.distributed.is_initialized() is False
