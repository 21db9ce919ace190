"""`aligntok evaluate text-to-image` from its command line: small pictures, small networks, every number and refusal."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from inception_weights import SmallExtractor, use_small_networks
from prompted_folders import write_picture, write_sampled
from text_scorer_weights import TINY_HPS, add_tiny_hps, reward_state, write_bert_tokenizer, write_clip, write_hps

from aligntok.cli import main
from aligntok.errors import UserError
from aligntok.evaluation.adm import write_samples
from aligntok.evaluation.counted import called, count_of
from aligntok.evaluation.hps import HumanPreferenceScore

PROMPTS = ["a red fox", "a dog on the hill", "the hill", "a dog"]


class Letters:
    """Stands for the text encoder: features are how often letters occur, half of them on each of two tokens."""

    def __init__(self, config, precision) -> None:
        self.name = config.name

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.tensor([[float(caption.count(letter)) for letter in "abcdefghij"] for caption in captions])
        features = torch.zeros(len(captions), 5, 10)
        features[:, :2] = counts[:, None]
        return features, torch.full((len(captions),), 2)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    use_small_networks(monkeypatch)
    monkeypatch.setattr("aligntok.evaluation.text_probes.EfficientNetLite0", SmallExtractor)
    monkeypatch.setattr("aligntok.commands.evaluate_text.TextEncoder", Letters)


@pytest.fixture
def drawn(tmp_path) -> Path:
    return write_sampled(tmp_path / "drawn", [{"prompt": prompt} for prompt in PROMPTS])


def write_real(folder: Path, count: int = 24, classes: tuple[str, ...] = ("x", "y")) -> Path:
    """Pictures with captions beside them."""
    for number in range(count):
        file = folder / classes[number % len(classes)] / f"{number}.png"
        write_picture(file, 100 + number)
        file.with_suffix(".txt").write_text(f"{'abcdefghij'[number % 10]} picture {number}")
    return folder


def evaluate(drawn: Path, *more: str | Path, output: Path | None = None) -> dict:
    arguments = ["evaluate", "text-to-image", "--pictures", drawn, *more]
    assert main([*map(str, arguments), *(["--output", str(output)] if output else [])]) == 0
    return json.loads(output.read_text()) if output else {}


def refusal(capsys, *arguments: str | Path) -> str:
    assert main(["evaluate", "text-to-image", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_every_score_is_named_with_its_weights_and_prompts(drawn, tmp_path, monkeypatch, capsys):
    add_tiny_hps(tmp_path / "configs")
    tiny = partial(HumanPreferenceScore, architecture=TINY_HPS)
    monkeypatch.setattr("aligntok.evaluation.text_scores.HumanPreferenceScore", tiny)
    clip = write_clip(tmp_path / "clip", length=10)
    torch.save(reward_state(), tmp_path / "ImageReward.pt")
    weights = ("--clip", clip, "--hpsv2", write_hps(tmp_path / "2.0.pt"))
    weights += ("--hpsv2_1", write_hps(tmp_path / "2.1.pt", seed=1), "--pickscore", clip)
    weights += ("--image_reward", tmp_path / "ImageReward.pt")
    weights += ("--image_reward_tokenizer", write_bert_tokenizer(tmp_path / "bert"))
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    found = evaluate(drawn, *weights, "--prompts", file, output=tmp_path / "numbers.json")
    assert list(found) == ["CLIP score x100", "HPSv2.0 x100", "HPSv2.1 x100", "PickScore", "ImageReward"]
    for measured in found.values():
        assert "sha256" in measured["protocol"] and "prompts prompts.txt, n=4, sha256" in measured["protocol"]
        assert "mean over 8 pictures" in measured["protocol"]
    assert found["HPSv2.0 x100"]["values"] != found["HPSv2.1 x100"]["values"]
    printed = capsys.readouterr()
    assert "HPSv2.1 x100" in printed.out and "not measured" not in printed.err
    assert "have the same weights" in refusal(
        capsys, "--pictures", drawn, *weights[:4], "--hpsv2_1", tmp_path / "2.0.pt"
    )
    evaluate(drawn, "--clip", clip)
    told = capsys.readouterr().err
    assert "no package carries them: HPSv2.0 (--hpsv2, xswu/HPSv2), HPSv2.1" in told and "CLIP score (" not in told


def test_distances_have_their_counts_in_their_names(drawn, small, tmp_path):
    real = write_real(tmp_path / "real", 8)
    found = evaluate(drawn, "--reference", real, "--fid_count", 8, output=tmp_path / "numbers.json")
    assert list(found) == ["generation, ADM protocol", "generation, EffNetLite0"]
    adm = ["gFID-8", "gKID", "sFID-8", "IS", "precision", "recall"]
    assert list(found["generation, ADM protocol"]["values"]) == adm
    assert list(found["generation, EffNetLite0"]["values"]) == ["gFD-EffNetLite0-8", "gKD-EffNetLite0"]
    assert f"reference: {real}, 8 pictures; prompts drawn/prompts.jsonl" in found[next(iter(found))]["protocol"]
    write_picture(real / "x/more.png", 7)
    more = evaluate(drawn, "--reference", real, output=tmp_path / "numbers.json")
    assert "gFID-8-vs-9" in more["generation, ADM protocol"]["values"]


def test_counts_other_than_the_names_are_refused(drawn, small, tmp_path, capsys):
    real = write_real(tmp_path / "real", 9)
    asked = ("--pictures", drawn, "--reference", real)
    assert "names 6000 pictures, and there are 8 in --pictures" in refusal(capsys, *asked, "--fid_count", "6K")
    assert "names 8 pictures, and there are 9 in --reference" in refusal(capsys, *asked, "--fid_count", "8")
    assert "expected a number of pictures like 6K" in refusal(capsys, *asked, "--fid_count", "many")
    assert "belongs to gFID" in refusal(capsys, "--pictures", drawn, "--real", real, "--fid_count", "8")
    stored = tmp_path / "real.npz"
    write_samples(stored, torch.zeros(9, 3, 32, 32, dtype=torch.uint8))
    told = refusal(capsys, "--pictures", drawn, "--reference", stored, "--fid_count", "8")
    assert "there are 9 in --reference" in told
    write_real(real, 8)
    (real / "x/8.png").write_bytes(b"broken")
    told = refusal(capsys, "--pictures", drawn, "--reference", real, "--fid_count", "9")
    assert "names 9 pictures, and there are 8 in --pictures" in told
    (real / "y/7.png").unlink()
    told = refusal(capsys, *asked, "--fid_count", "8")
    assert "there are 7 readable ones in --reference" in told


def test_numbers_of_pictures():
    assert [count_of(text) for text in ("6K", "30k", "29696", " 8 ")] == [6000, 30000, 29696, 8]
    assert [called(count) for count in (6000, 30000, 29696)] == ["6K", "30K", "29696"]
    for text in ("0", "", "6.5K", "-1", "K"):
        with pytest.raises(UserError, match="expected a number of pictures"):
            count_of(text)


def test_probes_of_real_pictures_beside_the_drawn_ones(small, tmp_path, capsys):
    real = write_real(tmp_path / "real")
    captions = [f"{'abcdefghij'[i % 10]} picture {i}" for i in range(12)]
    drawn = write_sampled(tmp_path / "drawn", [{"prompt": caption} for caption in captions])
    options = ("--real", real, "--candidates", 4, "--held_out", 0.25)
    found = evaluate(drawn, *options, output=tmp_path / "numbers.json")
    names = ["retrieval 1 of 4", "retrieval 1 of 4, real pictures", "retrieval 1 of 4, chance"]
    assert list(found["captions"]["values"]) == names and found["captions"]["values"][names[2]] == 0.25
    for part in ("captions by minilm-l6, mean over tokens", "n=24 generated", "n=6 real held-out", "twelve numbers"):
        assert part in found["captions"]["protocol"]
    agreement = ["class agreement", "class agreement, real pictures", "class agreement, largest class"]
    assert list(found["classes"]["values"]) == agreement and "24 generated" in found["classes"]["protocol"]
    other = write_sampled(tmp_path / "other", [{"prompt": "unseen"}, {"prompt": "too", "class": "z"}])
    assert list(evaluate(other, *options, output=tmp_path / "numbers.json")) == ["captions"]
    assert "no class agreement" in capsys.readouterr().err
    named = write_sampled(tmp_path / "named", [{"prompt": "unseen", "class": "y"}, {"prompt": "too"}])
    found = evaluate(named, *options, output=tmp_path / "numbers.json")
    assert "2 generated" in found["classes"]["protocol"] and found["classes"]["values"][agreement[2]] == 1.0


def test_the_same_pictures_and_map_give_the_same_numbers_for_both(small, tmp_path):
    """Drawn pictures that are the held-out ones: both columns agree."""
    from aligntok.evaluation.text_probes import open_real
    from aligntok.training.monitoring.telemetry import Telemetry

    real = write_real(tmp_path / "real")
    held = open_real(str(real), None, 0.25, Telemetry(".", log_every=1))
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    lines = []
    for entry in held.held_out.entries:
        (drawn / entry.path.name).write_bytes(entry.path.read_bytes())
        lines.append(json.dumps({"prompt": held.captions[entry.name], "pictures": [entry.path.name]}))
    (drawn / "prompts.jsonl").write_text("\n".join(lines))
    found = evaluate(drawn, "--real", real, "--candidates", 3, output=tmp_path / "numbers.json")
    for table in ("captions", "classes"):
        made, ceiling, _ = found[table]["values"].values()
        assert made == ceiling


def test_folders_for_other_programs(tmp_path, capsys):
    records = [{"prompt": p, "tag": "t", "include": [], "item_id": f"i{n}"} for n, p in enumerate(PROMPTS)]
    drawn = write_sampled(tmp_path / "drawn", records, each=4)
    evaluate(drawn, "--geneval", tmp_path / "geneval", "--dpg", tmp_path / "dpg")
    told = capsys.readouterr()
    assert "16 pictures of 4 prompts in GenEval's layout" in told.err and "--resolution 32 --pic-num 4" in told.err
    assert (tmp_path / "geneval/00003/samples/0003.png").is_file() and (tmp_path / "dpg/i3.png").is_file()
    assert "is not empty" in refusal(capsys, "--pictures", drawn, "--geneval", tmp_path / "geneval")


def test_mistakes_are_told_before_any_work(drawn, small, tmp_path, capsys):
    real = write_real(tmp_path / "real")
    assert "nothing to measure" in refusal(capsys, "--pictures", drawn)
    assert "there is no file of prompts" in refusal(
        capsys, "--pictures", drawn, "--clip", "x", "--prompts", "absent.txt"
    )
    assert "--candidates is 1, expected at least 2" in refusal(
        capsys, "--pictures", drawn, "--real", real, "--candidates", 1
    )
    assert "--output" in refusal(capsys, "--pictures", drawn, "--real", real, "--output", tmp_path)
    assert "--held_out is 0, expected" in refusal(capsys, "--pictures", drawn, "--real", real, "--held_out", 0)
    bare = tmp_path / "bare"
    write_picture(bare / "a.png", 0)
    assert "no captions for the 1 images" in refusal(capsys, "--pictures", drawn, "--real", bare)
    assert "--clip nowhere.pt: there is no such file" in refusal(capsys, "--pictures", drawn, "--clip", "nowhere.pt")
    (drawn / "00002-0.png").write_bytes(b"broken")
    assert "1 pictures cannot be read, 00002-0.png" in refusal(capsys, "--pictures", drawn, "--reference", real)
    assert "1 pictures cannot be read, 00002-0.png" in refusal(
        capsys, "--pictures", drawn, "--real", real, "--candidates", 2
    )
