"""The whole pipeline on twenty small pictures: every command's work, end to end, in seconds."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import caption, of_text, tiny_recipe, write_pictures
from PIL import Image
from text_encoders import WORDS, write_encoder

from aligntok.cli import main, take_text
from aligntok.commands.quickstart import ABLATION, quickstart
from aligntok.config.parsing import parse_recipe
from aligntok.config.recipes import read_recipe, recipe_path
from aligntok.errors import UserError
from aligntok.evaluation.generation import draw
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import choose_precision
from aligntok.training.train_generator import train_generator


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = write_pictures(tmp_path_factory.mktemp("pictures"), 20)
    (folder / "disc" / "broken.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures) -> Path:
    recipe = tiny_recipe(tmp_path_factory.mktemp("run"), pictures)
    recipe.evaluation.ablation = True
    page = quickstart(recipe, "aligntok quickstart --data pictures")
    assert page == Path(recipe.output) / "report.html"
    return page.parent


def test_text_to_image(tmp_path):
    """Captions in the place of classes: what the page shows, and whether it is found in the pictures."""
    images = caption(write_pictures(tmp_path / "pictures", 24))
    for file, words in zip(sorted(images.rglob("*.txt")), itertools.permutations(WORDS[4:], 3), strict=False):
        file.write_text(" ".join(words))
    recipe = of_text(tiny_recipe(tmp_path / "run", images), write_encoder(tmp_path / "encoder", "bert"))
    recipe.evaluation.prompts = ("a red cat", "the sky")
    page = quickstart(recipe, "aligntok quickstart --text").read_text()
    assert "reads a caption and turns noise" in page and "a red cat" in page and "the sky" in page
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["prompts"] == ["a red cat", "the sky"]
    assert 0 <= results["generation"]["guidance 2"]["caption found of 10"] <= 1
    assert "captions as in the reference" in results["protocols"]["generation"]
    assert Image.open(tmp_path / "run" / "overview.png").size[0] > 4 * 32


def test_text_of_the_command_line():
    assert take_text(["--ablation"]) == (False, ["--ablation"]) and take_text(["--text"]) == (True, [])
    given = ["--output", "x", "--text", "a cat", "the sky", "--ablation"]
    found, rest = take_text(given)
    assert found and rest == ["--output", "x", "--ablation", '--evaluation.prompts=["a cat", "the sky"]']
    assert parse_recipe("quickstart", rest[-1:]).evaluation.prompts == ("a cat", "the sky")


def test_results_have_every_table(run):
    results = json.loads((run / "results.json").read_text())
    stages = {"stage1", "stage2", "stage3", ABLATION}
    assert set(results["reconstruction"]) == stages
    assert set(results["probe"]) == {"encoder", *stages}
    assert set(results["generation"]) == {"no guidance", "guidance 2"}
    assert results["reconstruction"]["stage3"].keys() == {
        "PSNR [dB]",
        "SSIM",
        "ST-LPIPS",
        "rFD-EffNetLite0",
        "rKD-EffNetLite0",
    }
    assert results["latents_unchanged"] is True
    assert [name.split(":")[0] for name in results["skipped_images"]] == ["disc/broken.png"]
    assert results["dataset"]["images"] == 21 and results["classes"] == ["disc", "square"]
    assert results["times"].keys() >= {"features", "stage1", "stage2", "stage3", ABLATION, "generator"}


def test_page_is_written_and_names_the_classes(run):
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 8
    assert Image.open(run / "overview.png").size[0] > 4 * 32
    assert "disc" in page and "square" in page and "broken.png" in page


def test_a_second_call_trains_nothing_again(run, pictures, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    recipe = tiny_recipe(run, pictures)
    recipe.evaluation.ablation = True
    quickstart(recipe, "again")
    skipped = json.loads((run / "results.json").read_text())["skipped_images"]
    assert [name.split(":")[0] for name in skipped] == ["disc/broken.png"]
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "already finished" in capsys.readouterr().err


def test_sample_reconstruct_and_evaluate(run, pictures, tmp_path, capsys):
    parts = ["--tokenizer", str(run / "tokenizer")]
    generator = ["--generator", str(run / "generator")]
    output = tmp_path / "samples.png"
    command = ["sample", *generator, *parts, "--labels", "[square]", "--per_class", "3", "--output", str(output)]
    assert main([*command, "--separate", "true"]) == 0
    assert Image.open(output).size[0] > 3 * 32
    assert len(list(output.with_suffix("").glob("square-*.png"))) == 3
    restored = tmp_path / "restored.png"
    size = ["--images", str(pictures), "--image_size", "32"]
    assert main(["reconstruct", *parts, *size, "--output", str(restored)]) == 0
    assert Image.open(restored).size[1] > 2 * 32
    numbers = tmp_path / "numbers.json"
    written = ["--output", str(numbers)]
    assert main(["evaluate", "reconstruction", *parts, *size, *written]) == 0
    assert "n=20" in json.loads(numbers.read_text())["reconstruction"]["protocol"]
    assert "broken.png" in capsys.readouterr().err
    reference = ["--reference", str(pictures), "--count", "16", "--guidance", "2"]
    assert main(["evaluate", "generation", *parts, *generator, *reference, *written]) == 0
    assert "guidance 2" in json.loads(numbers.read_text())["generation, EffNetLite0"]["protocol"]


def test_statistics_complete_a_tokenizer_in_place(run, pictures, tmp_path):
    tokenizer = load_tokenizer(run / "stage1" / "tokenizer")
    expected = tokenizer.latent_mean.clone()
    tokenizer.latent_mean.fill_(float("nan"))
    tokenizer.save(tmp_path / "bare")
    recipe = tiny_recipe(tmp_path / "out", pictures)
    recipe.generator.tokenizer = str(tmp_path / "bare")
    with pytest.raises(UserError, match="aligntok statistics"):
        train_generator(recipe)
    images = ["--images", str(pictures), "--image_size", "32"]
    assert main(["statistics", "--tokenizer", str(tmp_path / "bare"), *images]) == 0
    torch.testing.assert_close(load_tokenizer(tmp_path / "bare").latent_mean, expected, atol=0.2, rtol=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "[circle]"], "no class 'circle'"),
        (["--labels", "circle"], "no class 'circle'"),
        (["--labels", "[2]"], "expected 0..1"),
        (["--steps", "0"], "at least 1"),
        (["--guidance_channels", "9", "--guidance", "2"], "expected 1..8"),
        (["--labels", "[\u00b2]"], "no class '\u00b2'"),
        (["--per_class", "0"], "--per_class is 0, expected at least 1"),
        (["--output", f"{__file__}/x.png"], f"cannot be made, for {__file__} is a file"),
        (["--separate", "true", "--output", "pictures"], "the folder pictures, which is a file"),
    ],
)
def test_sample_refuses(run, options, message, capsys, tmp_path):
    parts = ["--tokenizer", str(run / "tokenizer"), "--generator", str(run / "generator")]
    assert main(["sample", *parts, "--output", str(tmp_path / "x.png"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_class_that_is_named_twice_has_all_of_its_pictures(run, tmp_path):
    parts = ["--tokenizer", str(run / "tokenizer"), "--generator", str(run / "generator")]
    options = ["--labels", "[disc,square,disc]", "--per_class", "2", "--separate", "true"]
    assert main(["sample", *parts, *options, "--output", str(tmp_path / "x.png")]) == 0
    names = [f"disc-{n:04d}.png" for n in range(4)] + [f"square-{n:04d}.png" for n in range(2)]
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == names


@pytest.mark.parametrize("command", ["reconstruct", "statistics"])
def test_a_count_of_none_is_called_as_it_is_given(command, run, pictures, capsys):
    assert main([command, "--tokenizer", str(run / "tokenizer"), "--images", str(pictures), "--count", "0"]) == 2
    assert "--count is 0, expected at least 1" in capsys.readouterr().err


def test_a_generator_of_another_tokenizer_is_refused(run):
    generator = Generator(run / "generator")
    other = load_tokenizer(run / "stage1" / "tokenizer")
    with pytest.raises(UserError, match="another tokenizer"):
        draw(generator, other, torch.tensor([0]), generator.sampler, choose_precision("cpu", "fp32"))


def test_samples_follow_seed_place_and_label_alone(run):
    generator, tokenizer = Generator(run / "generator"), load_tokenizer(run / "tokenizer")
    sampler, precision = replace(generator.sampler, steps=2), choose_precision("cpu", "fp32")
    many = draw(generator, tokenizer, torch.tensor([0, 1, 0, 1]), sampler, precision, seed=3)
    few = draw(generator, tokenizer, torch.tensor([0, 1]), sampler, precision, seed=3)
    torch.testing.assert_close(many[:2], few, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(many[0], many[2], atol=1e-3)


def test_pictures_of_one_class_make_an_unconditional_generator(tmp_path):
    folder = write_pictures(tmp_path / "flat", 20, classes=("disc",))
    page = quickstart(tiny_recipe(tmp_path / "run", folder), "aligntok quickstart --data flat")
    results = json.loads((page.parent / "results.json").read_text())
    assert results["classes"] == ["disc"] and results["probe"] == {}
    assert set(results["generation"]) == {"no guidance"}


def test_more_classes_than_the_model_has_are_refused(tmp_path, run, pictures):
    recipe = tiny_recipe(tmp_path, pictures)
    recipe.generator.tokenizer = str(run / "tokenizer")
    recipe.generator.model.classes = 1
    with pytest.raises(UserError, match=r"2 classes, but generator\.model\.classes is 1"):
        train_generator(recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe: setattr(recipe.data, "held_out", 0.1), "data.held_out is 0.1 of 20 pictures, which gives 2"),
        (lambda recipe: setattr(recipe.evaluation, "samples", 3), "evaluation.samples is 3, expected at least 4"),
        (lambda recipe: setattr(recipe.evaluation, "guidance", -1.0), "sampler.guidance is -1"),
    ],
    ids=["held out", "samples", "guidance"],
)
def test_what_would_end_the_evaluation_is_said_before_training(change, message, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", write_pictures(tmp_path / "pictures", 20))
    change(recipe)
    with pytest.raises(UserError, match=message):
        quickstart(recipe, "aligntok quickstart")
    assert not list((tmp_path / "run").rglob("stage1"))


@pytest.mark.parametrize("missing", [True, False], ids=["no transformers", "another width"])
def test_a_text_encoder_that_does_not_serve_is_said_before_training(missing, tmp_path, monkeypatch):
    images = caption(write_pictures(tmp_path / "pictures", 24))
    recipe = of_text(tiny_recipe(tmp_path / "run", images), write_encoder(tmp_path / "encoder", "bert"))
    if missing:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        recipe.generator.text.encoder.width = 48
    message = r"pip install 'aligntok\[t2i\]'" if missing else "generator.text.encoder.width=32"
    with pytest.raises(UserError, match=message):
        quickstart(recipe, "aligntok quickstart --text")
    assert not list((tmp_path / "run").rglob("stage1"))


def test_classes_too_small_for_a_probe_and_guidance_that_is_none(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", 16, classes=("a", "b", "c", "d"))
    recipe = tiny_recipe(tmp_path / "run", folder)
    recipe.data.held_out, recipe.evaluation.guidance = 0.25, 1.0
    results = json.loads((quickstart(recipe, "aligntok quickstart").parent / "results.json").read_text())
    assert results["probe"] == {} and set(results["generation"]) == {"no guidance"}
    assert "no linear probe: it needs two classes of at least 5 pictures each" in capsys.readouterr().err


def test_text_through_the_real_command_is_the_recipe_of_text(capsys):
    """Its recipe stands on another one, as any default recipe may."""
    for given, base in ((["--text", "a green car"], "t2i_quickstart"), ([], "quickstart")):
        with pytest.raises(SystemExit) as ended:
            main(["quickstart", *given, "--data", "pictures", "--generator.steps", "7", "--print_config"])
        assert ended.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        expected = read_recipe(recipe_path(base))
        assert printed["generator"]["sampler"]["steps"] == expected["generator"]["sampler"]["steps"]
        assert printed["tokenizer"]["training"]["batch_size"] == expected["tokenizer"]["training"]["batch_size"]
        assert printed["generator"]["condition"] == ("text" if given else "class")
        assert (printed["evaluation"]["prompts"] == ["a green car"]) == bool(given)
        assert printed["data"]["path"] == "pictures" and printed["generator"]["steps"] == 7
