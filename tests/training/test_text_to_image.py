"""Text to image through the real commands: train, resume, sample by prompt, go on from weights, and what is refused."""

import json

import pytest
import torch
from helpers import caption, of_text, write_pictures
from PIL import Image
from switches import Bench, interrupted, same, sound
from text_encoders import write_encoder

from aligntok.cli import main
from aligntok.commands import sample as sample_command
from aligntok.config import SamplerConfig, TextEncoderConfig
from aligntok.evaluation.asked import Captions
from aligntok.evaluation.generation import draw
from aligntok.models.generator import Generator
from aligntok.models.text_encoder import TextEncoder
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import choose_precision

FP32 = choose_precision("cpu", "fp32")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def trained(bench):
    found = bench.plain("text", {})
    sound(found)
    return found.folder / "generator"


def sample(bench, generator, *options: str) -> int:
    return main(["sample", f"--generator={generator}", f"--tokenizer={bench.tokenizer}", "--steps=2", *options])


def test_a_folder_says_what_it_reads(trained, bench):
    found = Generator(trained)
    assert found.classes == [] and found.text is not None
    encoder = TextEncoder(TextEncoderConfig(str(bench.encoder), width=32, tokens=8), FP32)
    assert found.text.fingerprint == encoder.fingerprint() and found.text.encoder == encoder.config


def test_an_interrupted_run_ends_as_an_uninterrupted_one(bench, trained, monkeypatch):
    resumed = interrupted(bench, "text", {}, monkeypatch)
    sound(resumed)
    assert "resumed at step 2" in resumed.said
    same(resumed, bench.plain("text", {}))


def test_previews_show_captions(bench):
    found = bench.run("text", {"generator.training.preview_every": 4})
    sound(found)
    same(found, bench.plain("text", {}))
    [name] = found.previews
    assert Image.open(found.folder / "previews" / name).size[0] > 12 * 32


def test_latents_of_a_cache_beside_captions(bench):
    """In bf16 there, so that losses are near and weights not to the bit."""
    cached = bench.run("text", {"generator.latents": str(bench.cache)})
    sound(cached)
    for one, two in zip(cached.records, bench.plain("text", {}).records, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)


@pytest.fixture(scope="module")
def text_cache(bench):
    """A folder of `aligntok cache-text`."""
    folder = bench.folder / "text"
    given = {"images": bench.pictures, "output": folder, "encoder": bench.encoder, "tokens": 8, "precision": "fp32"}
    assert main(["cache-text", *(f"--{name}={value}" for name, value in given.items())]) == 0
    return folder


def test_captions_of_a_cache_train_as_those_that_are_encoded_now(bench, text_cache):
    """Both hold bfloat16; the seed chooses among a picture's captions all the same."""
    cached = bench.run("text", {"generator.text.features": str(text_cache)})
    sound(cached)
    same(cached, bench.plain("text", {}))
    limited = {"data.max_images": 12}
    same(bench.run("text", {"generator.text.features": str(text_cache)} | limited), bench.plain("text", limited))


def test_with_both_caches_no_picture_is_opened(bench, text_cache, monkeypatch):
    both = {"generator.latents": str(bench.cache), "generator.text.features": str(text_cache)}
    expected = bench.run("text", {"generator.latents": str(bench.cache)})
    missing = bench.folder / "away"
    bench.pictures.rename(missing)
    try:
        found = bench.run("text", both | {"data.path": str(bench.pictures)})
    finally:
        missing.rename(bench.pictures)
    sound(found)
    same(found, expected)


def test_a_text_cache_that_does_not_fit(bench, text_cache, tmp_path):
    cases = [
        ({"generator.text.encoder.layer": 1}, "holds features of layer -1"),
        ({"generator.text.encoder.tokens": 4}, "holds features of at most 8 tokens"),
        ({"data.path": str(caption(write_pictures(tmp_path / "p", 8)))}, "was made of other images"),
        ({"generator.text.features": str(tmp_path / "none")}, "no text cache at"),
    ]
    for fields, message in cases:
        found = bench.run("text", {"generator.text.features": str(text_cache)} | fields)
        assert found.status == 2 and message in found.said.splitlines()[-1], found.said.splitlines()[-1]


def test_sampling_by_prompt(trained, bench, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red cat", "id": 7}\n{"prompt": "a blue dog on the mat"}\n')
    options = [f"--prompts={prompts}", f"--output={tmp_path / 'a.png'}", "--per_class=2", "--separate=true"]
    assert sample(bench, trained, *options) == 0
    lines = [json.loads(line) for line in (tmp_path / "a" / "prompts.jsonl").read_text().splitlines()]
    assert lines[0] == {"prompt": "a red cat", "id": 7, "pictures": ["00000-0.png", "00000-1.png"]}
    files = {name for line in lines for name in line["pictures"]}
    assert files == {file.name for file in (tmp_path / "a").glob("*.png")}
    assert {Image.open(tmp_path / "a" / name).size for name in files} == {(32, 32)}
    wide = ["--prompt=[a red cat, the sky]", f"--output={tmp_path / 'b.png'}", "--per_class=1", "--size=[32, 48]"]
    assert sample(bench, trained, *wide) == 0 and Image.open(tmp_path / "b.png").size[0] > 2 * 48
    assert "4 pictures" in capsys.readouterr().err


def test_pictures_are_written_as_they_are_drawn(trained, bench, tmp_path, capsys, monkeypatch):
    """Of many prompts a batch is held, the sheet has the first ones, and their list comes last."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "a.png"
    prompts.write_text("a red cat\na blue dog\nthe sky\nthe mat\n")
    options = [f"--prompts={prompts}", f"--output={output}", "--per_class=2", "--separate=true"]
    assert sample(bench, trained, *options) == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert len(whole) == 9 and "a.png: 8 pictures" in capsys.readouterr().err
    everything = Image.open(output).size
    monkeypatch.setattr("aligntok.commands.sample.ROWS", 3)
    monkeypatch.setattr("aligntok.evaluation.generation.SAMPLING_BATCH", 5)
    drawn, there = sample_command.stream_draw, []

    def watched(*arguments, **named):
        for images in drawn(*arguments, **named):
            yield images
            there.append({file.name for file in (tmp_path / "a").iterdir() if file.stat().st_mtime_ns > start})

    monkeypatch.setattr(sample_command, "stream_draw", watched)
    start = max(file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir())
    assert sample(bench, trained, *options) == 0
    assert [len(files) for files in there] == [5, 8] and all("prompts.jsonl" not in files for files in there)
    assert {file.name for file in (tmp_path / "a").iterdir()} == set(whole)
    assert (tmp_path / "a" / "prompts.jsonl").read_bytes() == whole["prompts.jsonl"]
    assert "a.png: the first 6 of 8 pictures" in capsys.readouterr().err
    assert Image.open(output).size[1] < everything[1]


def test_long_prompts_are_named_and_other_scripts_are_drawn(trained, bench, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat on the mat under the sky\n\n赤い猫\nكلب أزرق\n🦊\n", encoding="utf-8")
    assert sample(bench, trained, f"--prompts={prompts}", f"--output={tmp_path / 'a.png'}", "--per_class=1") == 0
    said = capsys.readouterr().err
    assert "1 of 4 captions have more than 8 tokens and are cut: 'a red cat on the mat" in said and "4 pictures" in said


def test_prompts_decide_and_guidance_leads_away_from_the_negative(trained, bench):
    generator, tokenizer = Generator(trained), load_tokenizer(bench.tokenizer)
    encoder = TextEncoder(generator.text.encoder, FP32)
    plain = SamplerConfig(steps=2, time_shift=1.0)
    guided = SamplerConfig(steps=2, time_shift=1.0, guidance=5.0, guidance_interval=(0.0, 1.0))

    def drawn(text, sampler, negative=""):
        return draw(generator, tokenizer, Captions(encoder, [text], negative), sampler, FP32, seed=3)

    cat = drawn("a red cat", plain)
    assert not torch.equal(cat, drawn("the sky", plain))
    assert torch.equal(cat, drawn("a red cat", plain, "the sky"))  # without guidance nothing leads away
    assert not torch.equal(drawn("a red cat", guided), drawn("a red cat", guided, "the sky"))
    torch.testing.assert_close(drawn("a red cat", guided, "a red cat"), cat, rtol=1e-4, atol=1e-4)
    many = draw(generator, tokenizer, Captions(encoder, ["a red cat", "the sky"]), plain, FP32, seed=3)
    torch.testing.assert_close(many[:1], cat, rtol=1e-4, atol=1e-4)


def test_a_caption_that_is_dropped_is_the_empty_one(bench):
    from aligntok.runtime.world import Place
    from aligntok.training.conditions import ByCaption

    encoder = TextEncoder(TextEncoderConfig(str(bench.encoder), width=32, tokens=8), FP32)
    text, lengths = encoder.encode(["a red cat"] * 200)
    empty, length = (part[0] for part in encoder.encode([""]))
    given = ByCaption(empty, int(length), 0.5)({"text": text, "text_lengths": lengths}, Place(0, 200, 200))
    dropped = given[1] == length
    assert 60 < dropped.sum() < 140 and torch.equal(given[0][dropped][0], empty)
    assert torch.equal(given[0][~dropped][0], text[0]) and set(given[1].tolist()) == {int(length), int(lengths[0])}


def test_training_goes_on_from_a_generator_at_another_size(trained, bench):
    fields = {"generator.start": str(trained), "data.image_size": 64, "generator.learning_rate": 0.0}
    found = bench.run("text", fields)
    sound(found)
    same_weights, start = found.weights, Generator(trained).model.state_dict()
    assert Generator(found.folder / "generator").latent_shape == (8, 4, 4)
    assert all(torch.equal(same_weights[f"generator/{name}"], value) for name, value in start.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"generator.text.model.single_blocks": 2, "data.captions": "not_looked_for.jsonl"},
            "another network: single_blocks 1, expected single_blocks 2",
        ),
        ({"generator.condition": "class", "data.captions": "not_looked_for.jsonl"}, "which has another network: "),
        ({"generator.text.encoder.layer": 1}, "which has another text encoder"),
    ],
)
def test_a_start_that_does_not_fit(fields, message, trained, bench):
    """What the configuration says is compared before any caption is read."""
    found = bench.run("text", {"generator.start": str(trained)} | fields)
    assert found.status == 2 and message in found.said.splitlines()[-1]


@pytest.mark.parametrize(
    ("started", "fields", "message"),
    [
        ({}, {"generator.model.classes": 3}, "another network: classes 2, expected classes 3"),
        ({}, {"generator.model.depth": 3}, "another network: depth 1, expected depth 3"),
        ({"generator.model.classes": 3}, {}, "another number of classes: 3, expected 2"),
    ],
)
def test_a_start_of_classes_that_does_not_fit(started, fields, message, bench):
    start = bench.plain("generator", started).folder / "generator"
    found = bench.run("generator", {"generator.start": str(start)} | fields)
    assert found.status == 2 and message in found.said.splitlines()[-1]


def test_a_start_may_run_by_other_kernels(trained, bench):
    found = bench.run("text", {"generator.start": str(trained), "generator.text.model.attention": "sdpa"})
    sound(found)


def test_classes_and_captions_are_not_mixed_up(trained, bench, tmp_path, capsys):
    classes = bench.plain("generator", {}).folder / "generator"
    other = write_encoder(tmp_path / "other", "bert", seed=1)
    cases = [
        (trained, ["--labels=disc"], "draws what a caption says: give --prompt"),
        (trained, [], "draws what a caption says: give --prompt"),
        (trained, ["--prompt="], "--prompt is empty"),
        (trained, ["--prompt=a", "--prompts=b.txt"], "both given"),
        (trained, ["--prompt=a", "--labels=disc"], "both given"),
        (trained, ["--prompt=a", f"--text_encoder={other}"], "another text encoder"),
        (trained, ["--prompt=a", "--size=[32, 33]"], "size is 33, expected a multiple"),
        (trained, ["--prompts=none.txt"], "there is no file of prompts"),
        (classes, ["--prompt=a red cat"], "knows 2 classes (disc, square, ...) and reads no captions"),
        (classes, ["--negative=a"], "belong to captions"),
        (trained, ["--prompt=a", "--negative=b", "--guidance=1"], "guidance is 1, which is none"),
    ]
    for generator, options, message in cases:
        assert sample(bench, generator, f"--output={tmp_path / 'x.png'}", *options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error, (options, error)
    evaluated = [f"--generator={trained}", f"--tokenizer={bench.tokenizer}", f"--reference={bench.pictures}"]
    assert main(["evaluate", "generation", *evaluated, "--count=4"]) == 2
    assert "draws what a caption says" in capsys.readouterr().err.splitlines()[-1]


def test_pictures_without_captions(bench, tmp_path):
    bare = write_pictures(tmp_path / "bare", 8)
    found = bench.run("text", {"data.path": str(bare)})
    assert found.status == 2 and "no captions for the 8 images" in found.said.splitlines()[-1]
    some = caption(write_pictures(tmp_path / "some", 12))
    for file in sorted(some.rglob("*.txt"))[:3]:
        file.unlink()
    partly = bench.run("text", {"data.path": str(some), "data.held_out": 0.0, "generator.training.batch_size": 2})
    assert partly.status == 0 and "3 without a caption" in partly.said and "9 pictures" in partly.said, partly.said


def test_the_plan_of_a_text_to_image_recipe(capsys):
    assert main(["plan", "--config", "t2i_2b_256", "--parts", "generator", "--gpus", "8", "64"]) == 0
    said = capsys.readouterr().out
    assert "FLUX transformer 2041.20" in said


def test_of_text_is_a_recipe_for_the_command(bench):
    """What the other tests train is what a recipe file would say."""
    recipe = of_text(bench.recipe("generator", {}), bench.encoder)
    assert recipe == bench.recipe("text", {}, output=bench.folder / recipe.output)
