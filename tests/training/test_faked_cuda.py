"""Whole steps with `device: cuda` where none is: every stage, the generator and guided samples, on the faked device.

Here the operators are PyTorch's references; under `python -m benchmarks.sanitize --part steps` ttsem executes what
Triton's compiler makes of the kernels. What neither can tell is in tests/faked_cuda.py.
"""

import io
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from faked_cuda import OnCuda, faked_cuda
from helpers import caption, of_text, tiny_recipe, write_pictures
from switches import Outcome, sound, turn
from text_encoders import write_encoder
from torch import nn

from aligntok.cli import main
from aligntok.evaluation.asked import Asked, Captions
from aligntok.evaluation.generation import draw
from aligntok.kernels import _triton
from aligntok.models.generator import Generator
from aligntok.models.text_encoder import TextEncoder
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import choose_precision
from aligntok.training.train_generator import train_generator

EXECUTED = "ttsem" in sys.modules  # Triton's kernels are executed
STEPS = 2


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Afterwards nothing of the process knows of a GPU."""
    if torch.cuda.is_available() and not EXECUTED:
        pytest.skip("needs Triton's interpreter")
    if not EXECUTED:
        monkeypatch.setenv("ALIGNTOK_KERNELS", "reference")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]
    _triton._capability.cache_clear()


def run(command: str, folder: Path, pictures: Path, device: str, encoder: Path | None = None) -> Outcome:
    """A command on a recipe of a few thousand parameters, a step or two of every part, with every loss; with a text
    encoder its generator reads captions."""
    one, two = {"steps": 1, "gan_start": 0}, {"steps": STEPS, "gan_start": 1}
    recipe = tiny_recipe(folder, pictures, stage1=one, stage2=two, stage3=one)
    recipe.generator.model.classes, recipe.generator.steps, recipe.generator.model.width = None, STEPS, 64
    chosen = {"device": device, "precision": "bf16", "checkpoint_every": 1}
    fields = {f"{part}.training.{k}": v for part in ("tokenizer", "generator") for k, v in chosen.items()}
    if encoder is not None:
        of_text(recipe, encoder).generator.text.model.width, recipe.generator.text.model.heads = 64, 1
    recipe, said = turn(recipe, fields), io.StringIO()
    parsed = mock.patch("aligntok.cli.parse_recipe", lambda *_, **__: recipe)
    with parsed, redirect_stderr(said), redirect_stdout(said):
        status = main([command])
    return Outcome(status, said.getvalue(), folder, recipe)


def samples(folder: Path, device: str, guidance: float, cuda_graph: bool = True, steps: int = 4) -> torch.Tensor:
    place = folder if (folder / "tokenizer").exists() else folder.with_name("2")
    generator, tokenizer = Generator(folder / "generator"), load_tokenizer(place / "tokenizer")
    precision = choose_precision(device, "bf16")
    asked: Asked = torch.tensor([0, 1, 1])
    if generator.text is not None:
        asked = Captions(TextEncoder(generator.text.encoder, precision), ["a red cat", "the sky", ""])
    sampler = replace(generator.sampler, steps=steps, solver="heun", guidance=guidance, cuda_graph=cuda_graph)
    return draw(generator, tokenizer.to(precision.device), asked, sampler, precision, seed=0)


def test_every_part_trains_and_samples_are_drawn(tmp_path: Path):
    """Pinned batches on a stream of their own, fused AdamW, autocast, checkpoints; replays draw what plain calls do."""
    pictures = write_pictures(tmp_path / "pictures", 12)
    with faked_cuda() as seen:
        for command in ("train-tokenizer", "train-generator"):
            found = run(command, tmp_path / "run", pictures, "cuda")
            sound(found)
            assert "faked sm_90" in found.said
            assert min(seen[name] for name in ("pinned", "stream", "wait_stream", "record_stream", "event")) > 0, seen
            assert seen["autocast"] > 0
        recorded = samples(tmp_path / "run", "cuda", guidance=2.0)
        assert seen["graph"] == 2 and seen["replay"] == 4, seen  # with guidance and, past its interval, without
        assert torch.equal(recorded, samples(tmp_path / "run", "cuda", guidance=2.0, cuda_graph=False))
        assert recorded.device.type == "cpu" and recorded.isfinite().all()


def test_text_to_image_trains_and_draws(tmp_path: Path):
    """The text encoder on the device, captions beside pinned batches, and graphs over z, t, features and lengths."""
    pictures = caption(write_pictures(tmp_path / "pictures", 12))
    encoder = write_encoder(tmp_path / "encoder", "qwen3")
    with faked_cuda() as seen:
        assert run("train-tokenizer", tmp_path / "run", pictures, "cuda").status == 0
        found = run("train-generator", tmp_path / "run", pictures, "cuda", encoder)
        sound(found)
        assert "12 images, from files beside the pictures" in found.said
        seen.clear()
        recorded = samples(tmp_path / "run", "cuda", guidance=2.0)
        assert seen["graph"] == 2 and seen["replay"] == 4, seen
        assert torch.equal(recorded, samples(tmp_path / "run", "cuda", guidance=2.0, cuda_graph=False))


def test_a_step_of_training_waits_once_and_one_of_sampling_never(tmp_path: Path):
    """For the guard's two numbers, behind an event; everything else comes once in a part, whatever its length."""
    pictures, waits = write_pictures(tmp_path / "pictures", 12), []
    with faked_cuda() as seen:
        assert run("train-tokenizer", tmp_path / "2", pictures, "cuda").status == 0
        for steps in (2, 6):
            recipe = tiny_recipe(tmp_path / f"{steps}", pictures)
            recipe.generator.tokenizer, recipe.generator.steps = str(tmp_path / "2" / "tokenizer"), steps
            recipe.generator.training.device, recipe.generator.training.log_every = "cuda", 100
            seen.clear()
            train_generator(recipe)
            waits.append((seen["read back"], seen["event waited for"]))
        for steps in (4, 8):
            seen.clear()
            samples(tmp_path / "6", "cuda", guidance=2.0, cuda_graph=False, steps=steps)
            waits.append((seen["read back"], seen["event waited for"]))
    assert waits[1][0] == waits[0][0] and waits[1][1] - waits[0][1] == 4, waits
    assert waits[2] == waits[3], waits


def test_what_a_gpu_refuses_is_refused():
    """So that a copy that was forgotten fails here too."""
    with faked_cuda(), torch.no_grad():
        network, x = nn.Linear(4, 5).to("cuda"), torch.randn(3, 4)
        with pytest.raises(RuntimeError, match="same device"):
            network(x)
        found = network(x.to("cuda"))
        assert isinstance(found, OnCuda) and found.is_cuda and found.device == torch.device("cuda:0")
        with pytest.raises(TypeError, match=r"Tensor\.cpu"):
            found.numpy()
        with pytest.raises(RuntimeError, match="pin"):
            found.pin_memory()
        assert found.cpu().device.type == "cpu"


def test_a_replay_repeats_the_operators_and_not_python():
    with faked_cuda() as seen, torch.no_grad():
        place, factor = torch.ones(3, device="cuda"), 2.0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = place * factor
        place.fill_(5)
        factor = 100.0
        graph.replay()
        assert found.tolist() == [10.0] * 3
        assert seen == Counter({"graph": 1, "replay": 1, "read back": 1})
