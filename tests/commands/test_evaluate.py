"""`aligntok evaluate` from its command line: tiny tokenizer and generator, small pictures, every part and refusal."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Job, places, run_at_once
from helpers import tiny_tokenizer, write_pictures
from inception_weights import SmallExtractor, use_small_networks

from aligntok.cli import main
from aligntok.commands import evaluate as job
from aligntok.config import LightningDiTConfig, SamplerConfig
from aligntok.errors import UserError
from aligntok.evaluation import generation as generation_module
from aligntok.evaluation import probes
from aligntok.evaluation.adm import sample_shape
from aligntok.evaluation.generation import choose_labels
from aligntok.evaluation.tokenizer import Measured
from aligntok.models.generator import Generator, save_generator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import choose_precision


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """tokenizer, other (of another fingerprint), generator, pictures, train and val."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, std in (("tokenizer", 1.0), ("other", 2.0)):
        tokenizer = tiny_tokenizer()
        tokenizer.set_statistics(torch.zeros(8), torch.full((8,), std))
        tokenizer.save(folder / name)
        if name == "tokenizer":
            config = LightningDiTConfig(size="custom", depth=1, width=32, heads=2, classes=2)
            torch.manual_seed(0)
            model = LightningDiT(config, 8, (2, 2))
            sampler = SamplerConfig(steps=2, time_shift=1.0)
            save_generator(
                folder / "generator", model, model.state_dict(), sampler, ["disc", "square"], tokenizer.fingerprint()
            )
    write_pictures(folder / "pictures", 24)
    (folder / "pictures" / "disc" / "broken.png").write_bytes(b"not a picture")
    write_pictures(folder / "train", 40)
    write_pictures(folder / "val", 12)
    return folder


@pytest.fixture(autouse=True)
def no_cached_inception(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


@pytest.fixture
def inception(monkeypatch):
    use_small_networks(monkeypatch)


PAIR = ("--generator", "{run}/generator", "--tokenizer", "{run}/tokenizer")
PROBE = ("probe", "--tokenizer", "{run}/tokenizer", "--images", "{run}/pictures", "--image_size", "32")


def evaluate(*arguments: str | Path) -> int:
    return main(["evaluate", *map(str, arguments)])


def measured(output: Path) -> dict:
    return json.loads(output.read_text())


def test_reconstruction(run, tmp_path, capsys, monkeypatch):
    command = ("reconstruction", "--tokenizer", run / "tokenizer", "--images", run / "pictures", "--image_size", 32)
    assert evaluate(*command, "--output", tmp_path / "numbers.json") == 0
    found = measured(tmp_path / "numbers.json")["reconstruction"]
    assert list(found["values"]) == ["PSNR [dB]", "SSIM", "ST-LPIPS", "rFD-EffNetLite0", "rKD-EffNetLite0"]
    assert "n=24, 32x32 px" in found["protocol"] and "all of" in found["protocol"]
    printed = capsys.readouterr()
    assert "PSNR [dB]" in printed.out and found["protocol"] in printed.out
    assert "--inception" in printed.err and "broken.png" in printed.err
    monkeypatch.setattr(job, "EfficientNetLite0", SmallExtractor)
    assert evaluate(*command, "--held_out", 0.25, "--perceptual", "none", "--output", tmp_path / "few.json") == 0
    few = measured(tmp_path / "few.json")["reconstruction"]
    assert "held-out share 0.25" in few["protocol"] and "ST-LPIPS" not in few["values"]
    assert few["values"]["PSNR [dB]"] != found["values"]["PSNR [dB]"]


def test_reconstruction_with_inception(run, tmp_path, inception):
    command = ("reconstruction", "--tokenizer", run / "tokenizer", "--images", run / "pictures", "--image_size", 32)
    assert evaluate(*command, "--perceptual", "none", "--output", tmp_path / "numbers.json") == 0
    values = measured(tmp_path / "numbers.json")["reconstruction"]["values"]
    assert list(values) == ["PSNR [dB]", "SSIM", "rFID", "rKID", "rFD-EffNetLite0", "rKD-EffNetLite0"]


def generation(run: Path, *more: str | Path) -> int:
    pair = ("--generator", run / "generator", "--tokenizer", run / "tokenizer")
    return evaluate("generation", *pair, "--reference", run / "pictures", "--count", 9, *more)


def test_batches_do_not_decide_what_is_drawn(run, monkeypatch):
    """Pictures are those of one large batch, whatever is in memory at once."""
    generator, tokenizer = Generator(run / "generator"), load_tokenizer(run / "tokenizer")
    arguments = (generator, tokenizer, torch.arange(9) % 2, generator.sampler, choose_precision("cpu", "fp32"))
    whole = generation_module.draw(*arguments, seed=3)
    monkeypatch.setattr(generation_module, "SAMPLING_BATCH", 4)
    parts = list(generation_module.stream_draw(*arguments, seed=3))
    assert [len(part) for part in parts] == [4, 4, 1]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)


def test_label_policies():
    assert choose_labels("balanced", 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    random = choose_labels("random", 30_000, 3, seed=1)
    assert torch.equal(random, choose_labels("random", 30_000, 3, seed=1)) and random[:9].bincount().tolist() != [3] * 3
    assert (random.bincount() - 10_000).abs().max() < 400  # five standard deviations
    with pytest.raises(UserError, match="expected random or balanced"):
        choose_labels("all", 3, 3)


def test_generation_without_inception_has_other_names_only(run, tmp_path, capsys):
    output = tmp_path / "numbers.json"
    guided = ("--guidance", 2, "--guidance_channels", 3, "--guidance_interval", "[0.1, 1.0]", "--steps", 3)
    assert generation(run, "--labels", "balanced", *guided, "--output", output) == 0
    found = measured(output)
    assert list(found) == ["generation, EffNetLite0"]
    assert list(found["generation, EffNetLite0"]["values"]) == ["gFD-EffNetLite0", "gKD-EffNetLite0"]
    protocol = found["generation, EffNetLite0"]["protocol"]
    for part in ("balanced labels of 2 classes, seed 0", "3 network evaluations", "guidance 2 on first 3 channels"):
        assert part in protocol
    assert "for t in [0.1, 1]" in protocol
    assert "no FID, sFID, IS, precision or recall" in capsys.readouterr().err


def test_generation_through_a_file_gives_the_same_numbers(run, tmp_path, inception):
    """Drawn and measured at once; drawn into a file and measured; the file alone: one set of numbers."""
    outputs = [tmp_path / f"{name}.json" for name in ("direct", "kept", "stored")]
    samples = tmp_path / "samples.npz"
    assert generation(run, "--output", outputs[0]) == 0
    assert generation(run, "--npz", samples, "--output", outputs[1]) == 0
    assert sample_shape(samples) == (9, 32, 32)
    stored = ("--samples_file", samples, "--reference", run / "pictures", "--output", outputs[2])
    assert evaluate("generation", *stored) == 0
    direct, kept, alone = map(measured, outputs)
    assert list(direct) == ["generation, ADM protocol", "generation, EffNetLite0"]
    assert list(direct["generation, ADM protocol"]["values"]) == ["gFID", "gKID", "sFID", "IS", "precision", "recall"]
    for name in direct:
        assert kept[name]["values"] == pytest.approx(direct[name]["values"], rel=1e-6)
        assert alone[name]["values"] == pytest.approx(direct[name]["values"], rel=1e-6)
    assert "random labels" in kept["generation, ADM protocol"]["protocol"]
    assert str(samples) in alone["generation, ADM protocol"]["protocol"]


SMALL_BATCHES = """
from aligntok.commands import evaluate
from aligntok.evaluation import generation
from aligntok.training import train_generator

def prepare():
    generation.SAMPLING_BATCH = 4
"""


def test_three_processes_draw_what_one_does(run, tmp_path):
    """Five batches, the last of them short; the file and the numbers are those of a single process."""
    jobs = {}
    for name, place in zip(("alone", "first", "second", "third"), [{}, *places(3)], strict=True):
        folder = tmp_path / ("one" if name == "alone" else "three")
        files = ["--npz", str(folder / "samples.npz"), "--output", str(folder / f"{name}.json")]
        pair = ["--generator", str(run / "generator"), "--tokenizer", str(run / "tokenizer")]
        options = [*pair, "--reference", str(run / "pictures"), "--count", "18", "--device", "cpu"]
        jobs[name] = Job(["evaluate", "generation", *options, *files], place)
    statuses, said = run_at_once(jobs, SMALL_BATCHES)
    assert set(statuses.values()) == {0}, said
    one, three = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "three"))
    assert one.shape == (18, 32, 32, 3) and np.array_equal(one, three)
    assert not (one == one[:1]).all(axis=(1, 2, 3))[1:].any(), "no two samples are the same"
    numbers = measured(tmp_path / "one" / "alone.json")["generation, EffNetLite0"]["values"]
    assert measured(tmp_path / "three" / "first.json")["generation, EffNetLite0"]["values"] == numbers
    assert sorted(file.name for file in (tmp_path / "three").iterdir()) == ["first.json", "samples.npz"]


def test_stored_samples_are_measured_by_one_process(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate("generation", "--samples_file", run / "s.npz") == 2
    assert "evaluate generation --samples_file runs in one process" in capsys.readouterr().err


def test_torch_fidelity_gets_the_same_images(run, tmp_path, inception, monkeypatch):
    """What it makes of them is compared in tests/evaluation/test_inception.py."""

    def numbers(samples, count, reference, reference_count, network):
        made, real = (torch.cat(list(batches())) for batches in (samples, reference))
        assert (len(made), len(real)) == (count, reference_count) == (9, 24) and len(list(samples())) == 1
        return Measured({"gFID": made.double().mean().item() - real.double().mean().item()}, "theirs")

    monkeypatch.setattr(job, "torch_fidelity_numbers", numbers)
    samples, output = tmp_path / "samples.npz", tmp_path / "numbers.json"
    assert generation(run, "--npz", samples, "--fidelity", "true", "--output", output) == 0
    assert list(measured(output))[-1] == "generation, torch-fidelity"


def test_samples_are_kept_where_measuring_fails(run, tmp_path, monkeypatch):
    samples = tmp_path / "samples.npz"
    monkeypatch.setattr(job.ImageFeatures, "add_all", lambda *arguments: 1 / 0)
    monkeypatch.setattr(job.RealImages, "__init__", lambda self, *rest: setattr(self, "extractors", []))
    with pytest.raises(ZeroDivisionError):
        generation(run, "--npz", samples)
    assert sample_shape(samples) == (9, 32, 32)


def test_a_reference_is_refused_before_samples_are_drawn(run, tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "dims_768.npz", mu=np.zeros(768), sigma=np.eye(768))
    monkeypatch.setattr(job.DrawnSamples, "batches", lambda *arguments: pytest.fail("samples were drawn"))
    assert generation(run, "--reference", tmp_path / "dims_768.npz", "--npz", tmp_path / "new" / "s.npz") == 2
    assert "mu has 768 values, expected 2048" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_probe_of_a_small_set(run, tmp_path, capsys):
    output = tmp_path / "numbers.json"
    command = ("probe", "--tokenizer", run / "tokenizer", "--images", run / "pictures", "--image_size", 32)
    assert evaluate(*command, "--neighbours", 4, "--output", output) == 0
    found = measured(output)
    assert list(found) == ["probe of latents", "probe of encoder", "alignment"]
    assert -1 < found["alignment"]["values"]["CKNNA"] < 1
    assert "k=4" in found["alignment"]["protocol"] and "own encoder" in found["alignment"]["protocol"]
    assert "cross-validated logistic regression" in capsys.readouterr().err


def test_a_probe_that_cannot_be_aligned_is_refused_before_anything_is_encoded(run, monkeypatch, capsys):
    """By the pictures that there are: 12 to validate on."""
    monkeypatch.setattr(probes, "encode_all", lambda *arguments: pytest.fail("encoded"))
    sets = ("--train", run / "train", "--val", run / "val", "--image_size", 32, "--neighbours", 12)
    assert evaluate("probe", "--tokenizer", run / "tokenizer", *sets) == 2
    assert "13 images, got 12" in capsys.readouterr().err.splitlines()[-1]


def test_probe_of_a_large_set_against_another_encoder(run, tmp_path, capsys):
    output = tmp_path / "numbers.json"
    sets = ("--train", run / "train", "--val", run / "val", "--image_size", 32, "--epochs", 3)
    encoder = ("--encoder", "vit_tiny_patch16_224", "--encoder_weights", "random", "--neighbours", 3)
    aligned = ("--alignment_images", 10, "--output", output)
    assert evaluate("probe", "--tokenizer", run / "tokenizer", *sets, *encoder, *aligned) == 0
    found = measured(output)
    assert list(found) == ["probe, pooled latents", "probe, flattened latents", "alignment"]
    assert "8 features" in found["probe, pooled latents"]["protocol"]
    assert "32 features" in found["probe, flattened latents"]["protocol"]
    assert "n=40" in found["probe, pooled latents"]["protocol"] and "n=12" in found["probe, pooled latents"]["protocol"]
    assert "n=10" in found["alignment"]["protocol"] and "vit_tiny_patch16_224" in found["alignment"]["protocol"]
    assert "trained by minibatches" in capsys.readouterr().err


REFUSED = {
    "no part": (["recontruction"], "did you mean 'reconstruction'"),
    "reference batch as originals": (
        ["reconstruction", "--tokenizer", "{run}/tokenizer", "--images", "adm.npz"],
        "validation images themselves",
    ),
    "size": (["reconstruction", "--tokenizer", "{run}/tokenizer", "--image_size", "33"], "multiple of the tokenizer's"),
    "nothing to measure": (["generation"], "--samples_file"),
    "both": (["generation", "--samples_file", "s.npz", "--generator", "g"], "leave out --generator"),
    "another tokenizer": (
        ["generation", "--generator", "{run}/generator", "--tokenizer", "{run}/other"],
        "latents of another tokenizer",
    ),
    "too few": (
        ["generation", "--generator", "{run}/generator", "--tokenizer", "{run}/tokenizer", "--count", "3"],
        "need at least 4",
    ),
    "second opinion without a file": (
        ["generation", "--generator", "{run}/generator", "--tokenizer", "{run}/tokenizer", "--fidelity", "true"],
        "needs Inception weights (--inception) and samples on the disk (--npz)",
    ),
    "oblong": (["generation", "--samples_file", "{run}/oblong.npz"], "expected square ones"),
    "half a probe": (["probe", "--tokenizer", "{run}/tokenizer", "--train", "x"], "needs both --train and --val"),
    "other classes": (
        ["probe", "--tokenizer", "{run}/tokenizer", "--train", "{run}/train", "--val", "embedded"],
        "the same classes",
    ),
    "inception": (
        ["generation", "--samples_file", "{run}/s.npz", "--inception", "/nowhere"],
        "no Inception weights at",
    ),
}


# Options that are wrong whatever the images say -> what is said, before an image is read or a folder made
REFUSED_AT_ONCE = {
    "count": (["generation", *PAIR, "--count", "-5"], "-5 samples (--count): "),
    "steps": (["generation", *PAIR, "--steps", "0"], "sampler.steps is 0"),
    "channels": (["generation", *PAIR, "--guidance_channels", "99"], "guidance_channels is 99, expected 1..8"),
    "interval": (["generation", *PAIR, "--guidance_interval", "[0.9, 0.1]"], "guidance_interval is [0.9, 0.1]"),
    "guidance": (["generation", *PAIR, "--guidance", "-3"], "sampler.guidance is -3"),
    "npz": (["generation", *PAIR, "--npz", "{run}/s.png/new/x.npz"], "s.png is a file"),
    "output": (["generation", *PAIR, "--output", "{run}"], "is a folder"),
    "output of a reconstruction": (["reconstruction", "--tokenizer", "t", "--output", "{run}"], "is a folder"),
    "output of a probe": ([*PROBE, "--output", "{run}"], "is a folder"),
    "epochs": ([*PROBE, "--epochs", "0"], "--epochs is 0, expected at least 1"),
    "batch": ([*PROBE, "--batch_size", "0"], "--batch_size is 0, expected at least 2"),
    "neighbours": ([*PROBE, "--neighbours", "0"], "k of at least 2"),
    "alignment images": ([*PROBE, "--alignment_images", "5"], "11 images, got 5"),
    "damaged samples": (["generation", "--samples_file", "{run}/s.png"], "expected an undamaged file"),
}


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_refusals_before_any_work(name, run, tmp_path, capsys, monkeypatch):
    (run / "s.png").write_bytes(b"no zip")
    monkeypatch.setattr(job, "RealImages", lambda *arguments: pytest.fail("the reference was measured"))
    monkeypatch.setattr(job, "load_tokenizer", lambda path: pytest.fail("a tokenizer was read"))
    arguments, message = REFUSED_AT_ONCE[name]
    kept = [] if "--npz" in arguments or "--samples_file" in arguments else ["--npz", str(tmp_path / "new" / "x.npz")]
    arguments = [*arguments, *(kept if arguments[0] == "generation" else [])]
    assert evaluate(*(argument.replace("{run}", str(run)) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0] and error[0].startswith("aligntok: error: ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line(name, run, capsys):
    np.savez(run / "s.npz", np.zeros((4, 32, 32, 3), np.uint8))
    np.savez(run / "oblong.npz", np.zeros((4, 32, 16, 3), np.uint8))
    arguments, message = REFUSED[name]
    assert evaluate(*(argument.replace("{run}", str(run)) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and error[-1].startswith("aligntok: error: ")


@pytest.mark.parametrize("part", ["reconstruction", "generation", "probe"])
def test_every_part_explains_itself(part, capsys):
    with pytest.raises(SystemExit) as done:
        evaluate(part, "--help")
    assert done.value.code == 0 and f"aligntok evaluate {part}" in capsys.readouterr().out
