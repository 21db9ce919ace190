"""Features of captions in memory, and beside the batches of every source."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer, write_pictures
from text_stand_in import WordEncoder

from aligntok.commands.cache_latents import cache_latents
from aligntok.config import DataConfig
from aligntok.data.captions import Captions
from aligntok.data.images import load_center_crops, open_images
from aligntok.data.latent_cache import CachedLatentSource, LatentCache, LatentsBeside
from aligntok.data.sources import MemorySource, Source, StreamSource
from aligntok.data.text_beside import TextBeside, pictures_of
from aligntok.data.text_features import TextTable, encode_captions
from aligntok.errors import UserError
from aligntok.runtime.world import World

TEXTS = [["a disc"], ["one", "another one", "a third"], [], ["a disc", "much longer than six words are"], ["x"]]
SIZE = 32


@pytest.fixture(scope="module")
def encoder() -> WordEncoder:
    return WordEncoder()


@pytest.fixture(scope="module")
def table(encoder) -> TextTable:
    return encode_captions(Captions(TEXTS, "a test"), encoder)


def test_features_are_those_of_the_encoder_within_bfloat16(table, encoder):
    flat = Captions(TEXTS, "").flat()
    rows = torch.tensor([3, 0, 5, 5, 6])
    features, lengths = table.features(rows)
    exact, expected = encoder.encode([flat[row] for row in rows])
    assert features.shape == (5, 6, 8) and features.dtype == torch.float32 and torch.equal(lengths, expected)
    assert torch.equal(features, exact.bfloat16().float()) and len(table) == 7
    assert [table.rows_of_picture(n) for n in range(5)] == [
        range(0, 1),
        range(1, 4),
        range(4, 4),
        range(4, 6),
        range(6, 7),
    ]
    assert torch.equal(table.empty[0], encoder.encode([""])[0][0].bfloat16().float()) and table.empty[1] == 1
    assert (table.width, table.tokens) == (8, 6)


def test_equal_captions_are_encoded_once_and_the_longest_first():
    encoder = WordEncoder()
    done = []
    table = encode_captions(Captions(TEXTS, ""), encoder, lambda *at: done.append(at), batch_size=4)
    assert encoder.encoded == [4, 3] and done == [(4, 7), (7, 7)]
    assert torch.equal(*(table.features(torch.tensor([row]))[0] for row in (0, 4)))


def test_cut_captions_are_said(encoder):
    said = []
    encode_captions(Captions(TEXTS, ""), encoder, say=said.append)
    assert said == ["1 of 6 captions have more than 6 tokens and are cut: 'much longer than six words are'"]


def test_the_fingerprint_is_of_encoder_and_captions(table):
    others = [(WordEncoder(layer=0), TEXTS), (WordEncoder(), TEXTS[:4]), (WordEncoder(), [*TEXTS[:4], ["y"]])]
    found = {encode_captions(Captions(texts, ""), encoder).fingerprint for encoder, texts in others}
    assert len(found | {table.fingerprint}) == 4
    assert encode_captions(Captions(TEXTS, "elsewhere"), WordEncoder()).fingerprint == table.fingerprint


def test_more_than_the_limit_is_refused_before_anything_is_encoded():
    encoder = WordEncoder(width=1024)
    with pytest.raises(UserError, match=r"7 captions take .* more than data.memory_limit_gib \(1e-06\): .* aligntok x"):
        encode_captions(Captions(TEXTS, ""), encoder, limit_gib=1e-6, command="aligntok x")
    assert encoder.encoded == []


def test_captions_are_tokenized_in_parts_until_they_are_too_many(table, monkeypatch):
    monkeypatch.setattr("aligntok.data.text_features._TOKENIZED", 2)
    encoder, asked = WordEncoder(), []
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda captions: asked.append(len(captions)) or tokenize(captions))
    found = encode_captions(Captions(TEXTS, ""), encoder)
    assert found.values.equal(table.values) and found.offsets.equal(table.offsets)
    distinct, least = sum(asked), 3 * 8 * 2 / 2**30  # the first two, "" and one of two words or more, take 4 tokens
    assert max(asked) == 2 and len(asked) > 2
    asked.clear()
    with pytest.raises(UserError, match=r"more than data\.memory_limit_gib"):
        encode_captions(Captions(TEXTS, ""), encoder, limit_gib=least)
    assert sum(asked) < distinct


def test_features_that_are_not_finite_are_refused(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "encode_ids", lambda ids: (torch.full((7, 6, 8), torch.nan), torch.full((7,), 6)))
    with pytest.raises(UserError, match="features of words are not finite"):
        encode_captions(Captions(TEXTS, ""), encoder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twelve, of which disc/004 cannot be read; captions of all but disc/000: "N", and "N again" of every other."""
    folder = write_pictures(tmp_path_factory.mktemp("pictures"), 12)
    (folder / "disc" / "004.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    return [[], *([f"{n}", f"{n} again"] if n % 2 else [f"{n}"] for n in range(1, 12))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, pictures) -> LatentCache:
    made = tmp_path_factory.mktemp("made")
    tokenizer = tiny_tokenizer()
    tokenizer.set_statistics(torch.zeros(8), torch.ones(8))
    tokenizer.save(made / "tokenizer")
    options = {"image_size": SIZE, "flip": True, "shard_size": 8, "batch_size": 4, "workers": 0}
    cache_latents(str(made / "tokenizer"), str(pictures), str(made / "c"), **options, precision="fp32", device="cpu")
    return LatentCache(made / "c")


KINDS = ("memory", "stream", "cache", "beside")


def with_text(kind: str, pictures, cache, texts, encoder, world=None, seed=0) -> TextBeside:
    """A source of the pictures with captions, the features of the captions beside it."""
    data = DataConfig(image_size=SIZE, workers=0)
    whole = open_images(str(pictures), say=lambda line: None)
    captions = Captions(texts, "a test")
    table = encode_captions(captions, encoder)
    numbers = torch.tensor(captions.pictures)
    readable = numbers[torch.isin(numbers, cache.training_numbers(data))]
    images = whole.subset((numbers if kind in ("memory", "stream") else readable).tolist())
    source: Source
    if kind == "stream":
        source = StreamSource(images, data, "center", 6, seed, say=lambda line: None, world=world)
        return TextBeside(source, table, pictures_of(source, images, numbers), seed)
    if kind == "cache":
        return TextBeside(CachedLatentSource(cache, readable, 6, seed, True, world), table, None, seed)
    source = MemorySource(*load_center_crops(images, SIZE), 6, seed, True, world)
    if kind == "beside":
        source = LatentsBeside(source, cache, readable)
        return TextBeside(source, table, pictures_of(source, images, readable), seed)
    return TextBeside(source, table, pictures_of(source, images, numbers), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_a_caption_of_its_own_picture(kind, pictures, cache, texts, encoder):
    source = with_text(kind, pictures, cache, texts, encoder)
    whole = open_images(str(pictures), say=lambda line: None)
    crops = {e.name: load_center_crops(whole.subset([n]), SIZE)[0][0] for n, e in enumerate(whole.entries) if n != 2}
    known = {n: encoder.encode(own)[0].bfloat16().float() for n, own in enumerate(texts) if own}
    seen = Counter()
    for step in range(8):
        batch = source.batch(step)
        assert batch["text"].shape == (6, 6, 8) and batch["text_lengths"].dtype == torch.int64
        for row in range(6):
            features = batch["text"][row]
            [n] = [n for n, own in known.items() if (own == features).all((1, 2)).any()]
            seen[n, int(batch["text_lengths"][row])] += 1
            if "images" in batch:
                shown = ((batch["images"][row] + 1) * 127.5).round().to(torch.uint8)
                picture = crops[whole.entries[n].name]
                assert torch.equal(shown.flip(-1) if batch["flip"][row] else shown, picture)
            else:
                assert int(batch["index"][row]) == n
    wanted = {(n, 2 + again) for n, own in enumerate(texts) for again in range(len(own))} - {(2, 2)}
    assert set(seen) == wanted and str(source).endswith("their captions' features from memory")


@pytest.mark.parametrize("kind", KINDS)
def test_captions_depend_on_seed_and_step_alone_and_processes_share_them_out(kind, pictures, cache, texts, encoder):
    straight = with_text(kind, pictures, cache, texts, encoder)
    batches = [straight.batch(step) for step in range(4)]
    again = with_text(kind, pictures, cache, texts, encoder).batch(3)
    assert all(torch.equal(again[key], batches[3][key]) for key in again)
    shares = [with_text(kind, pictures, cache, texts, encoder, World(rank, 3)) for rank in range(3)]
    for step in range(4):
        parts = [share.batch(step) for share in shares]
        found = {key: torch.cat([part[key] for part in parts]) for key in ("text", "text_lengths", "index")}
        same = found["index"] == batches[step]["index"]
        assert same.all() or kind == "stream"  # where the stand-in of an unreadable picture is one of the process's own
        assert same.sum() >= 5 and all(torch.equal(found[key][same], batches[step][key][same]) for key in found)
    other = with_text(kind, pictures, cache, texts, encoder)
    other.seed = 1
    assert any(not torch.equal(other.batch(step)["text"], batches[step]["text"]) for step in range(4))
    assert straight.order is straight.source.order


def test_what_comes_next_is_announced(pictures, cache, texts, encoder, monkeypatch):
    for kind in KINDS:
        source, asked, read = with_text(kind, pictures, cache, texts, encoder), [], []
        table, real = source.text, source.text.features
        monkeypatch.setattr(table, "announce", lambda rows, asked=asked: asked.append(rows.tolist()))
        monkeypatch.setattr(
            table, "features", lambda rows, read=read, real=real: [read.append(rows.tolist()), real(rows)][1]
        )
        for step in range(4):
            source.batch(step)
        same = [before == now for before, now in zip(asked, read[1:], strict=False)]
        assert all(same) or kind == "stream"  # there the stand-ins of an unreadable picture are found on reading


def test_a_picture_without_a_caption_is_a_mistake_of_the_caller(pictures, texts, encoder):
    images = open_images(str(pictures), say=lambda line: None)
    source = MemorySource(*load_center_crops(images, SIZE), batch_size=11, seed=0, flip=False)
    beside = TextBeside(
        source, encode_captions(Captions(texts, ""), encoder), pictures_of(source, images, torch.arange(12)), 0
    )
    with pytest.raises(AssertionError, match="without a caption are left out"):
        beside.batch(0)
