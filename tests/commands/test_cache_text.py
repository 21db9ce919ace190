"""A text cache: what is in it, killed and resumed, by several processes, damaged, and what it is not made of."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked import DIES_ON_A_FLUSH, Job, places, run_at_once
from helpers import write_pictures
from safetensors.torch import load_file, save_file
from text_stand_in import WordEncoder

from aligntok.cli import main
from aligntok.commands import cache_text as writing
from aligntok.commands.cache_text import cache_text
from aligntok.config import TextEncoderConfig
from aligntok.data.captions import read_captions
from aligntok.data.images import open_images
from aligntok.data.latent_format import images_fingerprint
from aligntok.data.shard_store import ShardStore
from aligntok.data.text_cache import TextCache
from aligntok.data.text_features import encode_captions
from aligntok.errors import UserError

OPTIONS = {"tokens": 6, "shard_size": 5, "batch_size": 3, "device": "cpu", "precision": "fp32", "encoder": "words"}
REST = {"captions": None, "revision": None, "layer": -1}
WORDS = TextEncoderConfig(name="words", tokens=6)
# A writer may die on its n-th flush to disk (cache.json, then each shard and its record).
STAND_IN = f"""
{DIES_ON_A_FLUSH}
from aligntok.commands import cache_text
from text_stand_in import WordEncoder

def prepare(dies_on):
    cache_text.TextEncoder = lambda config, precision: WordEncoder(tokens=config.tokens)
    die_on(dies_on)
"""
KILLS = {2: 0, 5: 1}  # flush on which a writer dies -> its finished shards


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(writing, "TextEncoder", lambda config, precision: WordEncoder(8, config.tokens, config.layer))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten: the second without a caption, the others with one to three; 17 captions, three of them too long."""
    folder = write_pictures(tmp_path_factory.mktemp("made") / "pictures", 10)
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        lines = [f"picture {number}", f"café {number}", "more than six words are in here"][: 1 + number % 3]
        if number != 1:
            file.with_suffix(".txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory, pictures) -> Path:
    """Four shards: rows 0 ... 17, of which 0 is the empty string."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "TextEncoder", lambda config, precision: WordEncoder(tokens=config.tokens))
        return make(tmp_path_factory.mktemp("cache") / "cache", pictures)


@pytest.fixture
def copy(cache, tmp_path) -> Path:
    return shutil.copytree(cache, tmp_path / "copy")


def make(folder: Path, pictures: Path, **changes) -> Path:
    cache_text(images=str(pictures), output=str(folder), **(OPTIONS | REST | changes))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"text-0000{number}.safetensors"


def test_the_cache_gives_what_the_table_in_memory_gives(cache, pictures):
    images = open_images(str(pictures))
    captions = read_captions(images, say=lambda line: None)
    table, found = encode_captions(captions, WordEncoder()), TextCache(cache, WORDS)
    assert len(found) == captions.count == 17 and (found.width, found.tokens) == (8, 6)
    assert torch.equal(found.starts, table.starts) and found.rows_of_picture(1) == range(1, 1)
    rows = torch.tensor([16, 0, 3, 3, 9, 4])
    found.announce(rows)
    for ours, theirs in zip(found.features(rows), table.features(rows), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert torch.equal(found.empty[0], table.empty[0]) and found.empty[1] == table.empty[1] == 1
    flat = captions.flat()
    assert found.captions(rows) == [flat[row] for row in rows.tolist()] and "café 4" in flat
    assert found.encoder_fingerprint == WordEncoder().fingerprint() and str(cache) in str(found)
    found.check_images(images)
    found.check_images(images_fingerprint(images))


def test_the_manifest_and_the_screen_say_what_is_in_it(cache, pictures, tmp_path, capsys):
    manifest = json.loads((cache / "cache.json").read_text())
    assert manifest["complete"] and [part["rows"] for part in manifest["shards"]] == [5, 5, 5, 3]
    assert manifest["cut"] == 3 and manifest["source"] == "files beside the pictures"
    make(tmp_path / "again", pictures)
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of 17 captions have more than 6 tokens and are cut: 'more than six words are in here'" in said
    assert "1 without a caption: disc/002.png" in said and "features of 17 captions of pictures" in said


@pytest.fixture(scope="module")
def processes(tmp_path_factory, pictures) -> tuple[Path, dict[str, int], str]:
    """(folder, exit statuses, standard error) of writers that die and of two that share one cache."""
    folder = tmp_path_factory.mktemp("processes")

    def command(name: str) -> list[str]:
        options = [f"--{key}={value}" for key, value in OPTIONS.items()]
        return ["cache-text", f"--images={pictures}", f"--output={folder / name}", *options]

    jobs = {f"killed{kill}": Job(command(f"killed{kill}"), prepare={"dies_on": kill}) for kill in KILLS}
    for rank, place in enumerate(places(2)):
        jobs[f"rank{rank}"] = Job(command("shared"), place, {"dies_on": None})
    return folder, *run_at_once(jobs, STAND_IN)


def test_pictures_and_an_encoder_that_lie_elsewhere_now_are_not_encoded_again(cache, copy, pictures, tmp_path, capsys):
    make(copy, shutil.copytree(pictures, tmp_path / "moved"), encoder="/models/words")
    assert contents(copy) == contents(cache) and "made anew" not in capsys.readouterr().err


@pytest.mark.parametrize("kill", KILLS)
def test_killed_while_it_writes_and_resumed_equals_uninterrupted(processes, cache, pictures, kill, monkeypatch):
    folder, statuses, said = processes
    assert statuses[f"killed{kill}"] == -signal.SIGKILL, said
    folder /= f"killed{kill}"
    assert list(folder.glob(".*.tmp")), "it died while it wrote"
    with pytest.raises(UserError, match="is unfinished; complete it with: aligntok cache-text"):
        TextCache(folder)
    made, original = [], ShardStore.save
    monkeypatch.setattr(ShardStore, "save", lambda self, n, *a, **b: (made.append(n), original(self, n, *a, **b)))
    make(folder, pictures)
    assert made == list(range(KILLS[kill], 4)), "a finished shard is not made again"
    assert contents(folder) == contents(cache)


def test_two_processes_make_the_cache_of_one(processes, cache):
    folder, statuses, said = processes
    assert statuses["rank0"] == statuses["rank1"] == 0, said
    assert contents(folder / "shared") == contents(cache)
    assert " ".join(said.split()).count("4 shards") == 1, "one process speaks for all"


def flip_a_bit(file: Path, position: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: flip_a_bit(shard(c)), "text-00001.safetensors differs from its checksum"),
        (lambda c: os.truncate(shard(c), 100), "text-00001.safetensors has 100 bytes, expected"),
        (lambda c: shard(c).unlink(), "text-00001.safetensors cannot be read"),
        (lambda c: shard(c).with_suffix(".json").write_text("{"), "text-00001.safetensors has a record that cannot be"),
    ],
)
def test_the_same_command_names_and_repairs_what_is_damaged(cache, copy, pictures, capsys, damage, message):
    damage(copy)
    before = {file.name: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")}
    make(copy, pictures)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("it is made anew") == 1 and message in said
    assert contents(copy) == contents(cache)
    changed = {file.name for file in copy.glob("*.safetensors") if before.get(file.name) != file.stat().st_mtime_ns}
    assert changed == {shard(copy).name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 7}, r"by another text encoder \(words, layer -1, at most 6 tokens, fp32, fingerprint .*7 tokens"),
        ({"layer": 0}, r"by another text encoder \(words, layer -1, .*; given words, layer 0"),
        ({"images": "other"}, r"of other images \(pictures, 10 images; given other, 4 images\): give another --output"),
        ({"captions": "list"}, r"of other captions \(17 from files beside the pictures; given 1 from .*l.jsonl\)"),
        ({"shard_size": 6}, r"with shard_size 5 \(given 6\): give another --output, or remove that folder"),
        ({"shard_size": 0}, "shard_size is 0, expected at least 1"),
        ({"tokens": 0}, "tokens is 0, expected at least 1"),
    ],
)
def test_what_does_not_belong_into_the_folder_is_refused(cache, pictures, tmp_path, change, message):
    before = contents(cache)
    other = write_pictures(tmp_path / "other", 4)
    (other / "disc" / "000.txt").write_text("x")
    (tmp_path / "l.jsonl").write_text('{"file": "000.png", "text": "x"}\n')
    given = {"other": other, "list": str(tmp_path / "l.jsonl")}
    change = {key: given.get(value, value) for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        make(cache, change.pop("images", pictures), **change)
    assert contents(cache) == before


def rewritten(name: str, place: int, value: int):
    """Damage that the header does not show."""

    def damage(folder: Path) -> None:
        tensors = load_file(shard(folder))
        tensors[name][place] = value
        save_file(tensors, shard(folder))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no text cache at .*: cache.json is missing; make one with: aligntok cache-text --images"),
        (lambda c: shard(c).unlink(), r"text-00001.safetensors cannot be read \(No such file.*make this shard anew"),
        (lambda c: os.truncate(shard(c), 9), "text-00001.safetensors has 9 bytes, expected"),
        (lambda c: flip_a_bit(shard(c), 6), "text-00001.safetensors is damaged"),
        (rewritten("offsets", 2, 99), "text-00001.safetensors is damaged .*its offsets lead elsewhere"),
        (rewritten("letter_offsets", 2, -9), "is damaged .*its letter_offsets lead elsewhere"),
        (rewritten("picture", 4, 10), "is damaged .*its captions belong to pictures that are not there"),
        (lambda c: (c / "cache.json").write_text('{"format": "x", "version": 1}'), "format 'x' version 1, expected"),
    ],
)
def test_a_damaged_cache_is_refused_by_name(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        TextCache(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "Qwen/Qwen3-0.6B"},
            r"holds features of words, but text.encoder.name is Qwen/Qwen3-0.6B: .*aligntok c",
        ),
        ({"tokens": 7}, "holds features of at most 6 tokens, but text.encoder.tokens is 7: change that"),
        ({"layer": -2}, "holds features of layer -1, but text.encoder.layer is -2"),
    ],
)
def test_features_of_another_encoder_are_refused_with_the_command(cache, change, message):
    config = TextEncoderConfig(**({"name": "words", "tokens": 6} | change))
    with pytest.raises(UserError, match=message) as raised:
        TextCache(cache, config)
    assert f"--encoder {config.name} --tokens {config.tokens}" in str(raised.value)


def test_an_encoder_may_lie_elsewhere_now(cache):
    TextCache(cache, TextEncoderConfig(name="/models/words", tokens=6))


def test_other_images_are_refused(cache, tmp_path):
    images = open_images(str(write_pictures(tmp_path / "others", 4)))
    with pytest.raises(
        UserError, match=r"of other images \(pictures, 10 images\) than those of data.path \(others, 4 i"
    ):
        TextCache(cache).check_images(images)
    with pytest.raises(UserError, match=r"than those of data\.path; remove it or name another"):
        TextCache(cache).check_images("0123456789abcdef")


def test_the_fingerprint_is_that_of_the_contents(cache, copy):
    assert TextCache(copy).fingerprint == TextCache(cache).fingerprint
    manifest = json.loads((copy / "cache.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (copy / "cache.json").write_text(json.dumps(manifest))
    assert TextCache(copy).fingerprint != TextCache(cache).fingerprint


def test_the_command_line_makes_one(pictures, tmp_path, capsys):
    (tmp_path / "l.jsonl").write_text('{"file": "000.png", "text": "from a list"}\n')
    arguments = [f"--images={pictures}", f"--captions={tmp_path / 'l.jsonl'}", f"--output={tmp_path / 'c'}"]
    assert main(["cache-text", *arguments, "--encoder=words", "--tokens=4", "--device=cpu"]) == 0
    cache = TextCache(tmp_path / "c")
    assert len(cache) == 1 and cache.captions(torch.tensor([0])) == ["from a list"]
    assert main(["cache-text", f"--images={pictures}", "--output=x", "--captions=/none.jsonl"]) == 2
    assert "no captions at /none.jsonl: the path does not exist" in capsys.readouterr().err


def test_features_of_a_real_encoder(tmp_path, monkeypatch):
    from text_encoders import write_encoder

    from aligntok.models.text_encoder import TextEncoder
    from aligntok.runtime.devices import choose_precision

    monkeypatch.setattr(writing, "TextEncoder", TextEncoder)
    folder = write_pictures(tmp_path / "set", 2)
    (folder / "disc" / "000.txt").write_text("a red cat\nthe sky")
    name = str(write_encoder(tmp_path / "bert", "bert"))
    config = TextEncoderConfig(name=name, tokens=16)
    cache = TextCache(make(tmp_path / "cache", folder, encoder=name, tokens=16), config)
    exact, lengths = TextEncoder(config, choose_precision("cpu", "fp32")).encode(["a red cat", "the sky"])
    features, found = cache.features(torch.arange(2))
    assert torch.equal(found, lengths)
    torch.testing.assert_close(features, exact, rtol=2**-8, atol=1e-5)
