"""data.buckets through the real commands: batches of one size, resumed, streamed, compiled, and what is refused."""

from functools import partial

import pytest
import torch
from helpers import tiny_tokenizer
from PIL import Image, ImageDraw
from switches import Bench, interrupted, near, same, sound

from aligntok.cli import main
from aligntok.config import DataConfig
from aligntok.errors import UserError
from aligntok.models.flux_transformer import FluxTransformer
from aligntok.models.generator import Generator
from aligntok.training.monitoring.telemetry import PartLog
from aligntok.training.sizes import counted_size, table_for

SHAPES = [(40, 40), (90, 60), (30, 60), (44, 40)]  # width, height: squares, 48 x 32 and 32 x 64


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def sized(bench) -> dict[str, object]:
    """Pictures of three shapes with captions, one that is too long, and the fields that train on them."""
    folder = bench.folder / "shapes"
    folder.mkdir()
    for number in range(17):
        size = SHAPES[number % 4] if number < 16 else (200, 10)
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((4, 4, 24 + number % 5, 24), fill=(15 * number, 0, 99))
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("a red cat" if number % 2 else "a blue dog\non the mat")
    return {
        "data.path": str(folder),
        "data.buckets": "short_side",
        "data.held_out": 0.0,
        "generator.steps": 8,
    }


@pytest.fixture(scope="module")
def plain(bench, sized):
    """The run, and the shapes of the latents that its network saw."""
    seen, forward = [], FluxTransformer.forward

    def watched(self, z, *others):
        if self.training and not z.is_meta:
            seen.append(tuple(z.shape))
        return forward(self, z, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FluxTransformer, "forward", watched)
        found = bench.run("text", sized)
    return found, seen


def test_batches_have_the_grids_of_their_sizes(plain):
    found, seen = plain
    sound(found)
    assert len(seen) == 8 and {shape[:2] for shape in seen} == {(4, 8)}
    assert {shape[2:] for shape in seen} == {(2, 2), (2, 3), (4, 2)}
    assert Generator(found.folder / "generator").latent_shape == (8, 2, 2)


def test_what_is_said(plain):
    said = " ".join(plain[0].said.split())
    for words in (
        "buckets: shapes: 16 of 17 images in 3 sizes",
        "1 too long or too high for any bucket: 16.png (200 x 10)",
        "data: 16 pictures of shapes in 3 sizes: 4 of 48 x 32, 8 of 32 x 32, 4 of 32 x 64, decoded once",
        "every size counted as 32 x 32",
    ):
        assert words in said


def test_an_interrupted_run_ends_as_an_uninterrupted_one(bench, sized, plain, monkeypatch):
    resumed = interrupted(bench, "text", sized, monkeypatch)
    sound(resumed)
    assert "resumed at step 2" in resumed.said
    assert "sizes of 17 pictures read from" in resumed.said and "buckets: shapes: 16 of 17" in resumed.said
    same(resumed, plain[0])


def test_streamed_pictures_train_as_those_in_memory(bench, sized, plain, monkeypatch):
    streamed = sized | {"data.memory_limit_gib": 1e-5, "data.workers": 0}
    found = bench.run("text", streamed)
    sound(found)
    assert "DALI is not used with data.buckets" in found.said and "frozen networks run in the loop" in found.said
    near(found, plain[0])
    same(interrupted(bench, "text", streamed, monkeypatch), found)


def test_micro_batches_previews_and_compiled_blocks(bench, sized, plain, monkeypatch):
    """Each block has a graph for every size."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    more = {"accumulate": 2, "compile": True, "preview_every": 4}
    found = bench.run("text", sized | {f"generator.training.{name}": value for name, value in more.items()})
    sound(found)
    near(found, plain[0])
    assert len(found.previews) == 2


def test_area_is_another_table(bench, sized):
    found = bench.run("text", sized | {"data.buckets": "area", "data.image_size": 64, "generator.steps": 2})
    sound(found)
    assert "in 3 sizes: 4 of 80 x 48, 8 of 64 x 64, 4 of 48 x 80" in " ".join(found.said.split())


def test_a_checkpoint_of_squares_is_not_gone_on_with(bench, sized, monkeypatch):
    folder, squares = bench.folder / "changed", {"data.buckets": "none", "generator.training.checkpoint_every": 1}

    def killed(self, done, values, images):
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartLog, "step", killed)
        bench.run("text", sized | squares, output=folder)
    found = bench.run("text", sized, output=folder)
    assert found.status == 2 and "data.buckets was none, is short_side" in found.said.splitlines()[-1], found.said


@pytest.mark.parametrize(
    ("command", "fields", "message"),
    [
        (
            "generator",
            {},
            "data.buckets is area, but a generator with generator.condition=class trains on square crops",
        ),
        ("tokenizer", {}, "data.buckets is area, but a tokenizer trains on square crops: set data.buckets=none"),
        ("rival", {}, "data.buckets is area, but a rival trains on square crops: set data.buckets=none"),
        (
            "text",
            {"generator.latents": "cache"},
            "but the latent cache cache is of square crops: set generator.latents",
        ),
        (
            "text",
            {"data.loader": "dali"},
            "data.loader is dali, which is not used for data.buckets=area: set data.loader",
        ),
        ("text", {"data.image_size": 40}, "data.image_size is 40, expected a multiple of 16 for data.buckets=area"),
        ("text", {"data.buckets": "wide"}, "data.buckets is 'wide', expected none, area or short_side"),
    ],
)
def test_refused_before_anything_is_read(command, fields, message, bench, monkeypatch):
    def opened(*arguments, **named):
        pytest.fail("images are opened")

    for module in ("training.generator_inputs", "training.train_tokenizer", "zoo.train_rival"):
        monkeypatch.setattr(f"aligntok.{module}.open_images", opened)
    found = bench.run(command, {"data.buckets": "area"} | fields)
    assert found.status == 2 and message in found.said.splitlines()[-1], found.said


def test_a_plan_says_what_it_counts(bench, capsys):
    assert main(["plan", "--config=t2i_2b_512", "--parts=generator", "--gpus=8"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Every size of data.buckets=area is counted as 512 x 512; the largest has 1.01 times its pixels." in said
    assert counted_size(DataConfig(image_size=512, buckets="short_side")).endswith("has 2.00 times its pixels.")
    assert counted_size(DataConfig()) == ""
    assert main(["train-tokenizer", "--config=t2i_2b_512", "--dry-run"]) == 2
    assert "but a tokenizer trains on square crops" in capsys.readouterr().err.splitlines()[-1]


def test_sides_have_to_be_whole_numbers_of_patches():
    tokenizer, area = tiny_tokenizer(), DataConfig(image_size=512, buckets="area")
    assert (384, 688) in table_for(area, tokenizer, 1)
    with pytest.raises(UserError, match=r"has sides of 688 px, expected multiples of 32 .*use data.buckets=short_side"):
        table_for(area, tokenizer, 2)
    assert (512, 640) in table_for(DataConfig(image_size=512, buckets="short_side"), tokenizer, 2)
    with pytest.raises(UserError, match=r"is 48, expected a multiple of 32 .* use 32 or 64"):
        table_for(DataConfig(image_size=48, buckets="area"), tokenizer, 2)


def test_tokenizers_of_one_size_are_refused(monkeypatch):
    tokenizer, data = tiny_tokenizer(), DataConfig(image_size=64, buckets="short_side")
    tokenizer.latent_mean = torch.zeros(8, 4, 4)  # as RAE's
    with pytest.raises(UserError, match=r"latent statistics are of 4 x 4 positions alone: set data.buckets=none"):
        table_for(data, tokenizer, 1)

    def grid(images):  # as MAETok's
        raise UserError("images are 64 x 128 px, this MAETok takes 64 x 64 px only")

    monkeypatch.setattr(tokenizer, "grid", grid)
    with pytest.raises(UserError, match=r"short_side, but images are 64 x 128 px, .* only: set data.buckets=none"):
        table_for(data, tokenizer, 1)
