"""Reading a latent cache: what is in it, in Order's order, never more than a batch, and nothing that is not right."""

import json
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aligntok.commands.cache_latents import cache_latents
from aligntok.config import DataConfig
from aligntok.data.geometry import to_unit_range
from aligntok.data.images import load_center_crops, open_images
from aligntok.data.latent_cache import CachedLatentSource, LatentCache, LatentsBeside
from aligntok.data.sources import MemorySource, StreamSource
from aligntok.errors import UserError
from aligntok.runtime.world import World
from benchmarks.bench_latent_cache import synthetic_cache

SIZE = 32
OPTIONS = {"image_size": SIZE, "flip": True, "shard_size": 6, "batch_size": 4, "workers": 0}
OPTIONS |= {"precision": "fp32", "device": "cpu"}
DATA = DataConfig(image_size=SIZE, workers=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """20 pictures in two classes; the third cannot be read."""
    folder = write_pictures(tmp_path_factory.mktemp("pictures"), 20)
    (folder / "disc" / "004.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer()
    found.set_statistics(torch.linspace(-0.1, 0.1, 8), torch.linspace(0.05, 0.2, 8))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures, tokenizer) -> Path:
    """A cache of four shards."""
    made = tmp_path_factory.mktemp("made")
    tokenizer.save(made / "tokenizer")
    cache_latents(str(made / "tokenizer"), str(pictures), str(made / "cache"), **OPTIONS)
    return made / "cache"


@pytest.fixture(scope="module")
def cache(folder, tokenizer) -> LatentCache:
    return LatentCache(folder, tokenizer.fingerprint())


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "cache")


@pytest.fixture(scope="module")
def crops(pictures):
    return load_center_crops(open_images(str(pictures)), SIZE)


def test_latents_are_those_of_the_tokenizer_within_bfloat16(cache, tokenizer, crops):
    pixels, labels = crops
    rows = torch.arange(len(cache))
    assert len(cache) == 19 and torch.equal(cache.labels(rows), labels)
    assert cache.index(rows).tolist() == [n for n in range(20) if n != 2]
    for mirrored in (False, True):
        images = to_unit_range(pixels)
        exact = tokenizer.encode(images.flip(-1) if mirrored else images)
        error = (cache.latents(rows, torch.full((19,), mirrored)) - exact).abs()
        # batches of another size differ by float32 rounding, which the rounding to bfloat16 can only add to
        assert (error <= 2**-8 * exact.abs() + 1e-5).all()
        assert error.max() > 1e-4, "bfloat16 was expected to round something"


def test_the_manifest_says_what_is_in_the_cache(folder, cache, tokenizer):
    manifest = json.loads((folder / "cache.json").read_text())
    assert manifest["complete"] and manifest["count"] == 19 and manifest["classes"] == ["disc", "square"]
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 6, 6, 2]
    assert manifest["skipped"] == [{"index": 2, "name": "disc/004.png", "reason": "not an image that Pillow knows"}]
    assert manifest["latent_mean"] == tokenizer.latent_mean.tolist()
    rows = torch.arange(19).repeat(2)
    latents = cache.latents(rows, torch.arange(38) < 19).double()
    torch.testing.assert_close(torch.tensor(manifest["mean"]), latents.mean((0, 2, 3)).float())
    deviations = latents.std((0, 2, 3), correction=0).float()
    torch.testing.assert_close(torch.tensor(manifest["std"]), deviations)


@settings(max_examples=40)
@given(rows=st.lists(st.integers(0, 18), max_size=30), seed=st.integers(0, 99))
def test_rows_in_any_order_and_number_equal_the_files(cache, rows, seed):
    shards = [load_file(file) for file in sorted(cache.folder.glob("*.safetensors"))]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    wanted, flip = torch.tensor(rows, dtype=torch.int64), torch.rand(len(rows), generator=generator(seed)) < 0.5
    expected = torch.where(flip.view(-1, 1, 1, 1), whole["flipped"][wanted], whole["latents"][wanted])
    cache.announce(wanted, flip)
    assert torch.equal(cache.latents(wanted, flip), expected.float())
    assert torch.equal(cache.labels(wanted), whole["labels"][wanted])
    assert torch.equal(cache.index(wanted), whole["index"][wanted])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("change", [{}, {"held_out": 0.3}, {"held_out": 0.3, "max_images": 11}])
def test_batches_are_those_of_the_images(cache, pictures, tokenizer, flip, change):
    data = replace(DATA, flip=flip, **change)
    images, _ = open_images(str(pictures), data.max_images).split(data.held_out)
    memory = MemorySource(*load_center_crops(images, SIZE), batch_size=4, seed=3, flip=flip)
    source = CachedLatentSource(cache, cache.training_numbers(data), batch_size=4, seed=3, flip=flip)
    for step in (0, 1, 7, 2):
        theirs, ours = memory.batch(step), source.batch(step)
        assert all(torch.equal(theirs[key], ours[key]) for key in ("labels", "flip", "rows"))
        torch.testing.assert_close(ours["latents"], tokenizer.encode(theirs["images"]), rtol=2**-8, atol=1e-5)


def test_a_batch_depends_on_the_step_alone_and_processes_share_it_out(cache):
    def source(world: World | None = None) -> CachedLatentSource:
        return CachedLatentSource(cache, cache.training_numbers(DATA), 6, 0, flip=True, world=world)

    straight = source()
    batches = [straight.batch(step) for step in range(6)]
    assert all(torch.equal(source().batch(5)[key], batches[5][key]) for key in batches[5])
    shares = [source(World(rank, 3)) for rank in range(3)]
    for step in range(6):
        parts = [share.batch(step) for share in shares]
        assert all(torch.equal(torch.cat([p[key] for p in parts]), batches[step][key]) for key in parts[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_latents_lie_beside_the_right_images(cache, pictures, tokenizer, in_memory):
    data = replace(DATA, held_out=0.2)
    numbers = cache.training_numbers(data)
    images = open_images(str(pictures)).subset(numbers.tolist())
    if in_memory:
        source = MemorySource(*load_center_crops(images, SIZE), batch_size=4, seed=0, flip=True)
    else:
        source = StreamSource(images, data, "center", 4, 0)
    beside = LatentsBeside(source, cache, numbers)
    for step in range(4):
        batch = beside.batch(step)
        torch.testing.assert_close(batch["latents"], tokenizer.encode(batch["images"]), rtol=2**-8, atol=1e-5)


def test_an_image_that_can_no_longer_be_read_is_refused(cache, pictures):
    pixels, labels = load_center_crops(open_images(str(pictures)), SIZE)
    source = MemorySource(pixels[1:], labels[1:], batch_size=4, seed=0, flip=True)
    with pytest.raises(UserError, match=r"1 images that are in the latent cache .* restore them"):
        LatentsBeside(source, cache, cache.training_numbers(DATA))


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"latents-0000{number}.safetensors"


def flip_bit(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


COMMAND = "aligntok cache-latents --tokenizer"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: shutil.rmtree(c), f"no latent cache at .*: cache.json is missing; make one with: {COMMAND}"),
        (lambda c: shard(c).unlink(), rf"latents-00001.safetensors cannot be read \(No such file.*{COMMAND}"),
        (lambda c: shard(c).write_bytes(shard(c).read_bytes()[:-1]), "00001.safetensors has 1135 bytes, expected 1136"),
        (lambda c: shard(c, 0).write_bytes(b""), "00000.safetensors has 0 bytes"),
        (lambda c: flip_bit(shard(c, 2), 6), "00002.safetensors has a damaged header"),
        (lambda c: (c / "cache.json").write_text("{"), "cache.json has nothing that can be read"),
        (
            lambda c: (c / "cache.json").write_text('{"format": "x", "version": 1}'),
            "has format 'x' version 1, expected",
        ),
    ],
)
def test_a_damaged_cache_is_refused_by_name(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        LatentCache(copy)


def test_no_bit_of_a_header_can_change_what_is_read(copy, cache):
    """A flipped bit is refused, or lies where nothing is decided (a name, white space, the unused metadata)."""
    file, rows = shard(copy), torch.arange(5, 11)
    sound, flip = file.read_bytes(), torch.arange(6) < 3
    expected, refused = cache.latents(rows, flip), 0
    length = 8 + int.from_bytes(sound[:8], "little")
    for position in range(length):
        flip_bit(file, position, bit=position % 7)
        try:
            found = LatentCache(copy)
            assert torch.equal(found.latents(rows, flip), expected), position
            assert torch.equal(found.index(rows), cache.index(rows)), position
        except UserError as error:
            assert "00001.safetensors has a damaged header" in str(error)
            refused += 1
        file.write_bytes(sound)
    assert refused > 0.9 * length


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused_before_training(label, copy):
    file = shard(copy)
    tensors = load_file(file)
    tensors["labels"][2] = label
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"has the label {label}, but the cache names [23] classes"):
        LatentCache(copy)


def test_an_unfinished_cache_is_refused(copy):
    manifest = json.loads((copy / "cache.json").read_text())
    (copy / "cache.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(UserError, match=f"is unfinished; complete it with: {COMMAND}"):
        LatentCache(copy)


def test_another_tokenizers_cache_is_refused_with_the_command(folder, cache):
    with pytest.raises(UserError) as refused:
        LatentCache(folder, "0123456789abcdef", "the command")
    assert re.search(
        f"fingerprint {cache.origin.tokenizer}, expected 0123456789abcdef.*: the command", str(refused.value)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 64}, "is of 32 px images, but data.image_size is 64"),
        ({"flip": True}, "has no mirror images, but data.flip is true: set it to false"),
    ],
)
def test_data_settings_that_the_cache_cannot_serve_are_refused(cache, folder, change, message):
    found = LatentCache(folder)
    found.origin = replace(found.origin, flip=False)
    found.check_data(replace(DATA, flip=False))
    with pytest.raises(UserError, match=message):
        found.check_data(replace(DATA, **{"flip": False} | change))


def test_other_images_are_refused(cache, tmp_path):
    with pytest.raises(
        UserError, match=r"made of other images \(.*, 20 images\) than those of data.path \(.*, 8 images"
    ):
        cache.check_images(open_images(str(write_pictures(tmp_path, 8))))


def test_the_fingerprint_is_that_of_the_contents(folder, copy):
    manifest = json.loads((copy / "cache.json").read_text())
    assert LatentCache(copy).fingerprint == LatentCache(folder).fingerprint
    manifest["shards"][0]["sha256"] = "0" * 64
    (copy / "cache.json").write_text(json.dumps(manifest))
    assert LatentCache(copy).fingerprint != LatentCache(folder).fingerprint


def test_no_more_than_a_batch_is_held(tmp_path):
    synthetic_cache(tmp_path, 5000, (32, 8, 8))  # 39 MiB
    tracemalloc.start()
    try:
        cache = LatentCache(tmp_path)
        source = CachedLatentSource(cache, cache.training_numbers(DATA), 64, 0, flip=True)
        for step in range(0, 79, 4):
            batch = source.batch(step)
            assert batch["latents"].shape == (64, 32, 8, 8) and not batch["latents"].any()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "a batch has 256 KiB of bfloat16"
