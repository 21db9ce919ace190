"""The banner: what is said is what runs."""

import io
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe, write_pictures
from rich.console import Console

from aligntok.config import LightningDiTConfig
from aligntok.errors import UserError
from aligntok.kernels import _dispatch, explain, use_implementation
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.machine import device_line
from aligntok.runtime.world import World
from aligntok.training.monitoring.banner import _size, generator_kernels, machine_line
from aligntok.training.monitoring.telemetry import PartLog, Telemetry
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining

PARTS = ("stage1", "stage2", "stage3", "generator")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str, dict[str, set[str]]]:
    """Folder of a run, what it said, and the operators that each part called while it trained."""
    folder, said, used = tmp_path_factory.mktemp("run"), io.StringIO(), {}
    recipe = tiny_recipe(folder, write_pictures(tmp_path_factory.mktemp("pictures"), 20))
    recipe.tokenizer.training.preview_every = recipe.generator.training.preview_every = 0
    telemetry = Telemetry(folder, 1, Console(file=said))
    announce, close = Telemetry.announce, PartLog.close

    def forget(self, *arguments):
        _dispatch._selected.clear()
        announce(self, *arguments)

    def note(self):
        used[self.name] = {key[0] for key in _dispatch._selected}
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Telemetry, "announce", forget)
        patch.setattr(PartLog, "close", note)
        TokenizerTraining(recipe, telemetry).run()
        train_generator(recipe, telemetry)
    return folder, said.getvalue(), used


def banner(said: str, part: str) -> list[str]:
    """The lines of a part."""
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"{part}: \d+ steps", line))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith("  "))
    return lines[start:end]


@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_of_a_part_are_those_that_it_calls(run, part):
    _, said, used = run
    (line,) = [line for line in banner(said, part) if "kernels: " in line]
    listed = dict(pair.split() for pair in re.search("kernels: (.*?);", line)[1].split(", "))
    called = used[part] | ({"adapter_projection"} if part == "stage3" else set())  # its latents were looked up
    called -= {"qknorm_attention"} if "attention: sdpa" in line else set()  # only asked for
    assert set(listed) == called
    device = choose_precision("auto", "fp32").device
    assert all(name == explain(op, device).name for op, name in listed.items())
    assert "attention: " in line and line.endswith("why not otherwise: aligntok doctor")


def test_a_part_says_data_parameters_peak_and_how_to_resume(run):
    folder, said, _ = run
    text = "\n".join(banner(said, "stage1"))
    assert "stage1: 4 steps of 4 images" in text and "data: 16 pictures of pictures" in text
    assert re.search(r"parameters: encoder \S+ M frozen, adapter \S+ K trained, decoder \S+ K trained, discr", text)
    assert "MFU against" in text and "measured here" in text
    assert re.search(rf"config [0-9a-f]{{16}}, output {folder}, a checkpoint every 100 steps; to resume", text)
    text = "\n".join(banner(said, "generator"))
    assert re.search(r"parameters: LightningDiT \S+ K trained \+ \d+ frozen, tokenizer \S+ M frozen", text)


def test_the_machine_is_said_once(run):
    assert run[1].count(f"torch {torch.__version__}") == 1


def test_machine_line():
    precision = choose_precision("cpu", "bf16")
    line = machine_line(precision, World(0, 8))
    assert "8 processes on cpu: " in line and line.endswith(f"; {precision}")
    assert machine_line(choose_precision("cpu", "fp32"), World()).endswith("; fp32")
    assert f"{torch.get_num_threads()} threads" in device_line(precision.device)


def test_the_batch_is_shared_out(run, tmp_path):
    recipe = tiny_recipe(tmp_path, write_pictures(tmp_path / "pictures", 8))
    said = io.StringIO()
    training = TokenizerTraining(recipe, Telemetry(tmp_path, 1, Console(file=said)))
    training.telemetry.world = World(0, 2)
    tokenizer = training.pretrained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aligntok.training.train_tokenizer.train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            training.run_stage("stage1", recipe.tokenizer.stages.stage1, tokenizer)
    assert "steps of 4 images (2 per process)" in said.getvalue()


def test_kernels_of_the_generator_follow_requests():
    precision = choose_precision("cpu", "bf16")
    model = LightningDiTConfig(size="custom", depth=1, width=32, heads=2, attention="sdpa")
    with use_implementation("reference"):
        line = generator_kernels(model, 256, precision)
    assert "adaln reference" in line and line.endswith("attention: sdpa")
    model.attention = "flash-attn"
    with pytest.raises(UserError, match="flash-attn needs a CUDA device"):
        generator_kernels(model, 256, precision)


@pytest.mark.parametrize(
    ("trained", "frozen", "text"),
    [
        (0, 0, "0 frozen"),
        (12, 0, "12 trained"),
        (0, 1500, "1.50 K frozen"),
        (2_500_000, 7, "2.50 M trained + 7 frozen"),
    ],
)
def test_sizes(trained, frozen, text):
    network = torch.nn.Module()
    network.a = torch.nn.Parameter(torch.empty(trained, device="meta"))
    network.b = torch.nn.Parameter(torch.empty(frozen, device="meta"), requires_grad=False)
    assert _size(network) == text
