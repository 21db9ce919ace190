"""Making a latent cache: killed and resumed, by several processes, into a folder that has another; training from it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked import DIES_ON_A_FLUSH, Job, places, run_at_once
from helpers import tiny_recipe, tiny_tokenizer, write_pictures
from safetensors.torch import load_file

from aligntok.cli import main
from aligntok.commands import cache_latents as writing
from aligntok.commands.cache_latents import cache_latents
from aligntok.config import Recipe
from aligntok.data.latent_format import record_file, shard_file
from aligntok.errors import UserError
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import load_tokenizer
from aligntok.training import loop
from aligntok.training.monitoring.telemetry import PartLog
from aligntok.training.recovery.guard import Interrupted
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining

OPTIONS = {"image_size": 32, "flip": True, "shard_size": 6, "batch_size": 4, "workers": 0}
OPTIONS |= {"precision": "fp32", "device": "cpu"}
# A writer may die on its n-th flush to disk (cache.json, then each shard and its record).
SETUP = f"""
{DIES_ON_A_FLUSH}
from aligntok.commands import cache_latents

def prepare(dies_on):
    die_on(dies_on)
"""
KILLS = {2: 0, 5: 1}  # flush on which a writer dies -> its finished shards


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """20 pictures, the third of which cannot be read."""
    folder = write_pictures(tmp_path_factory.mktemp("pictures"), 20)
    (folder / "disc" / "004.png").write_bytes(b"junk")
    return folder


def recipe_for(folder: Path, pictures: Path) -> Recipe:
    recipe = tiny_recipe(folder, pictures)
    recipe.data.held_out = 0.0
    return recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures) -> Path:
    """A run of all stages, from the images alone."""
    recipe = recipe_for(tmp_path_factory.mktemp("trained"), pictures)
    TokenizerTraining(recipe).run()
    return Path(recipe.output)


@pytest.fixture(scope="module")
def tokenizer(trained) -> Path:
    return trained / "stage2" / "tokenizer"


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tokenizer, pictures) -> Path:
    return make(tmp_path_factory.mktemp("cache") / "cache", tokenizer, pictures)


def make(folder: Path, tokenizer: Path, pictures: Path, **changes) -> Path:
    cache_latents(str(tokenizer), str(pictures), str(folder), **(OPTIONS | changes))
    return folder


def command(folder: Path, tokenizer: Path, pictures: Path) -> list[str]:
    options = [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()]
    return ["cache-latents", f"--tokenizer={tokenizer}", f"--images={pictures}", f"--output={folder}", *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def processes(tmp_path_factory, tokenizer, pictures) -> tuple[Path, dict[str, int], str]:
    """(folder, exit statuses, standard error) of writers that die and of two that share one cache."""
    folder = tmp_path_factory.mktemp("processes")
    jobs = {}
    for kill in KILLS:
        jobs[f"killed{kill}"] = Job(command(folder / f"killed{kill}", tokenizer, pictures), prepare={"dies_on": kill})
    for rank, place in enumerate(places(2)):
        jobs[f"rank{rank}"] = Job(command(folder / "shared", tokenizer, pictures), place, {"dies_on": None})
    return folder, *run_at_once(jobs, SETUP)


def test_images_that_lie_elsewhere_now_are_not_encoded_again(cache, tokenizer, pictures, tmp_path, capsys):
    moved, again = shutil.copytree(pictures, tmp_path / "moved"), shutil.copytree(cache, tmp_path / "again")
    make(again, tokenizer, moved)
    assert contents(again) == contents(cache) and "made anew" not in capsys.readouterr().err


@pytest.mark.parametrize("kill", KILLS)
def test_killed_while_it_writes_and_resumed_equals_uninterrupted(
    processes, cache, tokenizer, pictures, kill, monkeypatch
):
    folder, statuses, _ = processes
    assert statuses[f"killed{kill}"] == -signal.SIGKILL
    folder /= f"killed{kill}"
    assert list(folder.glob(".*.tmp")), "it died while it wrote"
    made, original = [], writing.Writer._save
    monkeypatch.setattr(writing.Writer, "_save", lambda self, n, *rest: (made.append(n), original(self, n, *rest)))
    make(folder, tokenizer, pictures)
    assert made == list(range(KILLS[kill], 4)), "a finished shard is not made again"
    assert contents(folder) == contents(cache)


def test_two_processes_make_the_cache_of_one(processes, cache):
    folder, statuses, said = processes
    assert statuses["rank0"] == statuses["rank1"] == 0
    assert contents(folder / "shared") == contents(cache)
    assert " ".join(said.split()).count("and their mirror images") == 1, "one process speaks for all"


def test_worker_processes_and_the_size_of_shards_do_not_change_a_latent(cache, tokenizer, pictures, tmp_path):
    assert contents(make(tmp_path / "workers", tokenizer, pictures, workers=2)) == contents(cache)
    other = make(tmp_path / "shards", tokenizer, pictures, shard_size=8)
    assert not (other / shard_file(3)).exists()
    rows = [torch.cat([load_file(f)["flipped"] for f in sorted(c.glob("*.safetensors"))]) for c in (cache, other)]
    torch.testing.assert_close(*rows, rtol=2**-7, atol=1e-5)  # other batches: one unit in the last place of bfloat16


def test_without_mirror_images_there_are_none(cache, tokenizer, pictures, tmp_path):
    plain = load_file(make(tmp_path / "plain", tokenizer, pictures, flip=False) / shard_file(1))
    assert plain.keys() == {"latents", "labels", "index"}
    assert torch.equal(plain["latents"], load_file(cache / shard_file(1))["latents"])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: flip_a_bit(c / shard_file(1)), "latents-00001.safetensors differs from its checksum"),
        (lambda c: os.truncate(c / shard_file(1), 100), "latents-00001.safetensors has 100 bytes, expected 1136"),
        (lambda c: (c / shard_file(1)).unlink(), "latents-00001.safetensors cannot be read"),
        (lambda c: (c / record_file(1)).write_text("{"), "latents-00001.safetensors has a record that cannot be read"),
    ],
)
def test_the_same_command_names_and_repairs_what_is_damaged(
    cache, tokenizer, pictures, tmp_path, capsys, damage, message
):
    copy = shutil.copytree(cache, tmp_path / "copy")
    damage(copy)
    before = {file.name: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")}
    make(copy, tokenizer, pictures)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("it is made anew") == 1 and f"{message}" in said
    assert contents(copy) == contents(cache)
    changed = {file.name for file in copy.glob("*.safetensors") if before.get(file.name) != file.stat().st_mtime_ns}
    assert changed == {shard_file(1)}


def test_shards_of_another_cache_are_not_taken_for_its_own(cache, tokenizer, pictures, tmp_path, capsys):
    copy = shutil.copytree(cache, tmp_path / "copy")
    (copy / "cache.json").unlink()
    make(copy, tokenizer, pictures, precision="bf16")
    assert " ".join(capsys.readouterr().err.split()).count("is a shard of another cache; it is made anew") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "other"}, r"by another tokenizer \(fingerprint .*, given .*\): give another --output"),
        ({"images": "other"}, r"of other images \(.*, 20 images; given .*, 8 images\): give another --output"),
        ({"shard_size": 5}, r"with shard_size 6 \(given 5\): give another --output, or remove that folder"),
        ({"precision": "bf16"}, r"with precision fp32 \(given bf16\)"),
        ({"image_size": 40}, "image_size is 40, expected a multiple of the tokenizer's downsampling 16"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"workers": -1}, "workers is -1, expected at least 0"),
    ],
)
def test_what_does_not_belong_into_the_folder_is_refused(cache, tokenizer, pictures, tmp_path, change, message):
    before = contents(cache)
    other = tiny_tokenizer(seed=1)
    other.set_statistics(torch.zeros(8), torch.ones(8))
    other.save(tmp_path / "tokenizer")
    given = {"tokenizer": tokenizer, "images": pictures}
    if "other" in change.values():
        change = {
            k: {"tokenizer": tmp_path / "tokenizer", "images": write_pictures(tmp_path / "o", 8)}[k] for k in change
        }
    arguments = given | change
    with pytest.raises(UserError, match=message):
        make(cache, arguments.pop("tokenizer"), arguments.pop("images"), **arguments)
    assert contents(cache) == before


def test_an_image_set_of_which_nothing_can_be_read_is_refused(tokenizer, tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 8)
    for file in pictures.rglob("*.png"):
        file.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"none of the 8 images of pictures could be read; the first, disc/000\.png"):
        make(tmp_path / "cache", tokenizer, pictures)


def test_latents_that_are_not_finite_are_refused(tokenizer, pictures, tmp_path):
    broken = load_tokenizer(tokenizer)
    torch.nn.init.constant_(
        broken.encoder.get_parameter(next(iter(dict(broken.encoder.named_parameters())))), torch.nan
    )
    broken.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="not finite"):
        make(tmp_path / "cache", tmp_path / "tokenizer", pictures)


def losses(telemetry_file: Path, part: str, name: str) -> torch.Tensor:
    records = [json.loads(line) for line in telemetry_file.read_text().splitlines()]
    return torch.tensor([record[name] for record in records if record["part"] == part])


def test_stage3_from_the_cache_equals_stage3_from_images(cache, trained, pictures, tmp_path):
    recipe = recipe_for(tmp_path, pictures)
    recipe.tokenizer.stages.stage3.latents = str(cache)
    for stage in ("stage1", "stage2"):
        shutil.copytree(trained / stage, tmp_path / stage)
    TokenizerTraining(recipe).run()
    online, cached = (losses(folder / "metrics.jsonl", "stage3", "l1") for folder in (trained, tmp_path))
    torch.testing.assert_close(cached, online, rtol=2e-3, atol=0)
    weights = [load_file(folder / "stage3" / "tokenizer" / "model.safetensors") for folder in (trained, tmp_path)]
    assert not any(torch.equal(weights[0][k], weights[1][k]) for k in weights[0] if k == "decoder.conv_out.weight")


def test_stage3_asks_for_its_cache_and_goes_on_when_it_is_there(trained, pictures, tmp_path, capsys):
    recipe = recipe_for(tmp_path / "run", pictures)
    recipe.tokenizer.stages.stage3.latents = str(tmp_path / "cache")
    for stage in ("stage1", "stage2"):
        shutil.copytree(trained / stage, tmp_path / "run" / stage)
    with pytest.raises(UserError, match="make one with: aligntok cache-latents") as refused:
        TokenizerTraining(recipe).run()
    arguments = str(refused.value).partition("make one with: aligntok ")[2].split()
    assert main([*arguments, "--workers=0", "--device=cpu"]) == 0
    assert TokenizerTraining(recipe).run().has_statistics


def test_stage3_refuses_a_cache_of_other_images(cache, trained, tmp_path):
    recipe = recipe_for(tmp_path, write_pictures(tmp_path / "others", 12))
    recipe.tokenizer.stages.stage3.latents = str(cache)
    for stage in ("stage1", "stage2"):
        shutil.copytree(trained / stage, tmp_path / stage)
    with pytest.raises(UserError, match=r"made of other images .* than those of data.path \(others, 12 images\)"):
        TokenizerTraining(recipe).run()


def test_only_decoder_training_after_another_stage_may_use_a_cache(cache, pictures, tmp_path):
    recipe = recipe_for(tmp_path, pictures)
    recipe.tokenizer.stages.stage1.latents = str(cache)
    with pytest.raises(UserError, match=r"stage1.latents is given, but the stage trains adapter, decoder"):
        TokenizerTraining(recipe).run()
    recipe = tiny_recipe(tmp_path, pictures, stage1={"steps": 0}, stage2={"steps": 0}, stage3={"latents": str(cache)})
    with pytest.raises(UserError, match=r"stage3.latents is given, but no stage before it has been trained"):
        TokenizerTraining(recipe).run()


def generator_recipe(folder: Path, pictures: Path | str, tokenizer: Path, latents: Path | None) -> Recipe:
    recipe = recipe_for(folder, pictures)
    recipe.generator.tokenizer = str(tokenizer)
    recipe.generator.latents = None if latents is None else str(latents)
    recipe.generator.steps = 8
    return recipe


def test_a_generator_from_the_cache_equals_one_from_images(cache, tokenizer, pictures, tmp_path):
    train_generator(generator_recipe(tmp_path / "online", pictures, tokenizer, None))
    folder = train_generator(generator_recipe(tmp_path / "cached", "/no/images/needed", tokenizer, cache))
    online, cached = (losses(tmp_path / run / "metrics.jsonl", "generator", "mse") for run in ("online", "cached"))
    torch.testing.assert_close(cached, online, rtol=5e-3, atol=0)
    assert not torch.equal(cached, online), "the cache rounds to bfloat16"
    assert Generator(folder).classes == ["disc", "square"]


def test_an_interrupted_generator_on_a_cache_resumes_to_the_bit(cache, tokenizer, tmp_path, monkeypatch):
    straight = train_generator(generator_recipe(tmp_path / "straight", "", tokenizer, cache))
    original = PartLog.step

    def step_then_signal(self, done, values, images):
        original(self, done, values, images)
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = generator_recipe(tmp_path / "resumed", "", tokenizer, cache)
    with monkeypatch.context() as patch:
        patch.setattr(PartLog, "step", step_then_signal)
        with pytest.raises(Interrupted):
            train_generator(recipe)
    weights = [load_file(f / "model.safetensors") for f in (straight, train_generator(recipe))]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def test_a_checkpoint_made_with_another_cache_is_refused(cache, tokenizer, pictures, tmp_path, monkeypatch):
    copy = shutil.copytree(cache, tmp_path / "cache")
    recipe = generator_recipe(tmp_path / "run", "", tokenizer, copy)
    recipe.generator.training.checkpoint_every = 1
    original, calls = loop.run_phase, []

    def fail_late(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("power cut")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_phase", fail_late)
        with pytest.raises(RuntimeError, match="power cut"):
            train_generator(recipe)
    shutil.rmtree(copy)
    make(copy, tokenizer, pictures, precision="bf16")
    with pytest.raises(UserError, match="another configuration"):
        train_generator(recipe)


def test_a_generator_refuses_the_cache_of_another_tokenizer(cache, tmp_path):
    other = tiny_tokenizer(seed=1)
    other.set_statistics(torch.zeros(8), torch.ones(8))
    other.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=rf"another tokenizer .* with: aligntok cache-latents --tokenizer {tmp_path}"):
        train_generator(generator_recipe(tmp_path, "", tmp_path / "tokenizer", cache))
