"""The study from end to end at a few steps: rows, snapshots, shared parts, and nothing done twice."""

import dataclasses
import json

import pytest
import torch
from helpers import seeded_encoder, tiny_config, tiny_recipe, write_pictures
from zoo_rivals import tiny_vit

from aligntok.cli import main
from aligntok.config import DecoderConfig, RepaEConfig, VAEConfig
from aligntok.config.recipes import merge
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import choose_precision
from aligntok.study import measure, rows, run
from aligntok.study.measure import pictures_of
from aligntok.study.rows import Row
from aligntok.training.train_generator import snapshot_folder

SHOWN = ["vae", "repa_e", "aligntok", "three_stages"]
DISTANCES = {"gFD-EffNetLite0", "gKD-EffNetLite0"}
CLOSELY = DISTANCES | {f"own {name}" for name in DISTANCES} | {"recognised"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(output, options) of a finished study; recipes stay patched for the module."""
    folder = tmp_path_factory.mktemp("study")
    images = write_pictures(folder / "images", count=40)
    base = dataclasses.asdict(tiny_recipe(folder / "base", images, stage3={"steps": 0}))
    base["generator"] |= {"snapshot_every": 2}
    rival = {key: base["tokenizer"][key] for key in ("crop", "losses", "training")}
    decoder = DecoderConfig(base_channels=8, channel_multipliers=(1, 1, 1, 1, 2), blocks=1, groups=4)
    vae = dataclasses.asdict(VAEConfig(latent_channels=tiny_config().adapter.latent_channels, networks=decoder))
    joint = dataclasses.asdict(RepaEConfig(encoder=tiny_vit(), depth=1, projector_width=16))
    stages = {"three_stages": {"stage3": {"steps": 2}}}

    def tiny(name):
        plain = {key: value for key, value in base.items() if key != "rival"}
        if name in ("vae", "repa_e"):
            kind = {"kind": name.replace("_", "-"), "vae": vae, "repa_e": joint}
            return plain | {"rival": rival | kind | {"stage": {"steps": 4, "gan_start": 2}}}
        return merge(plain, {"tokenizer": {"stages": stages.get(name, {})}})

    patch = pytest.MonkeyPatch()
    patch.setattr(rows, "values_of", tiny)
    patch.setattr(run, "values_of", tiny)
    # bf16 rounds differently from run to run (memory that is aligned differently), and discs are near one another
    patch.setattr(run, "choose_precision", lambda device: choose_precision(device, "fp32"))
    patch.setattr(measure, "Encoder", seeded_encoder)
    only = "[" + ",".join(SHOWN) + "]"
    options = ["--output", str(folder / "out"), "--seeds", "[1]", "--only", only, "--samples", "12"]
    options += ["--sampling_steps", "[2,4]"]
    assert main(["study", *options]) == 0
    yield folder / "out", options
    patch.undo()


def test_every_row_is_trained_and_measured(study):
    output, _ = study
    for name in SHOWN:
        measures = json.loads((Row(name, 1, output).folder / "measures.json").read_text())
        assert set(measures["tokenizers"]["final"]) >= {"reconstruction", "probe", "alignment", "cost", "fingerprint"}
        tokenizer = load_tokenizer(Row(name, 1, output).folder / "tokenizer")
        cost = measures["tokenizers"]["final"]["cost"]
        assert cost["decoder parameters [M]"] * 1e6 == sum(p.numel() for p in tokenizer.decoder.parameters())
        assert cost["encode [GFLOP]"] > 0 and cost["decode [GFLOP]"] > 0
        assert {"4/4/1", "4/4/2"} <= set(measures["generations"])
        assert ("2/4/1" in measures["generations"]) == (name in rows.COMPARED)
        assert ("4/2/1" in measures["generations"]) == (name in rows.COMPARED)
        assert measures["generations"].get("2/4/1", dict.fromkeys(CLOSELY)).keys() == CLOSELY
        assert measures["generations"].get("4/2/1", dict.fromkeys(CLOSELY)).keys() == CLOSELY
        assert measures["generations"]["4/4/2"].keys() == CLOSELY
        assert measures["perfect"].keys() == CLOSELY - DISTANCES
        assert all(0 <= found["recognised"] <= 1 for found in (measures["perfect"], measures["generations"]["4/4/2"]))
        kept = pictures_of(Row(name, 1, output))
        assert kept["reconstructions"].shape[1:] == (3, 32, 32) and len(kept["samples"]) == 2
    stages = json.loads((Row("three_stages", 1, output).folder / "measures.json").read_text())["tokenizers"]
    assert set(stages) == {"final", "stage1", "stage2", "stage3"}
    assert stages["stage2"]["fingerprint"] == stages["final"]["fingerprint"] != stages["stage1"]["fingerprint"]


def test_shared_stages_and_generators_are_the_same_files(study):
    output, _ = study

    def content(name, path):
        return (Row(name, 1, output).folder / path).read_bytes()

    weights = "stage1/tokenizer/model.safetensors"
    assert content("aligntok", weights) == content("three_stages", weights)
    weights = "generator/model.safetensors"
    assert content("aligntok", weights) == content("three_stages", weights) != content("vae", weights)


def test_the_generator_that_came_with_a_tokenizer_is_set_aside(study):
    folder = Row("repa_e", 1, study[0]).folder
    joint, own = Generator(folder / "joint_generator"), Generator(folder / "generator")
    assert (
        joint.tokenizer_fingerprint == own.tokenizer_fingerprint == load_tokenizer(folder / "tokenizer").fingerprint()
    )
    pairs = zip(joint.model.state_dict().values(), own.model.state_dict().values(), strict=True)
    assert not all(a.equal(b) for a, b in pairs)


def test_a_snapshot_is_a_generator_on_its_way(study):
    folder = Row("aligntok", 1, study[0]).folder
    early, late = Generator(snapshot_folder(folder, 2)), Generator(snapshot_folder(folder, 4))
    final = Generator(folder / "generator")
    assert early.tokenizer_fingerprint == final.tokenizer_fingerprint
    pairs = zip(late.model.state_dict().values(), final.model.state_dict().values(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    pairs = zip(early.model.state_dict().values(), final.model.state_dict().values(), strict=True)
    assert not all(a.equal(b) for a, b in pairs)


def test_a_second_call_measures_nothing_again(study):
    output, options = study
    files = sorted(output.rglob("measures.json")) + sorted(output.rglob("stage*/tokenizer/model.safetensors"))
    files += sorted(output.rglob("generator*/model.safetensors"))
    before = {file: file.stat().st_mtime_ns for file in files}
    (output / "study.md").unlink()
    assert main(["study", *options]) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == before
    text = (output / "study.md").read_text()
    assert "| AlignTok, d = 32 |" in text and "reconstructions.png" in text


def test_one_missing_number_alone_is_measured_again(study):
    output, options = study
    file = Row("aligntok", 1, output).folder / "measures.json"
    whole = json.loads(file.read_text())
    partly = json.loads(file.read_text())
    whole_alignment = whole["tokenizers"]["final"]["alignment"]["CKNNA"]
    del partly["tokenizers"]["final"]["alignment"], partly["generations"]["4/4/2"]
    partly["tokenizers"]["final"]["probe"]["mean"] = 0.123  # kept, since it is there
    file.write_text(json.dumps(partly))
    assert main(["study", *options]) == 0
    again = json.loads(file.read_text())
    whole["tokenizers"]["final"]["probe"]["mean"] = 0.123
    for measures in (again, whole):
        aligned = measures["tokenizers"]["final"].pop("alignment")
        assert aligned["CKNNA"] == pytest.approx(whole_alignment, abs=1e-3)
    assert again["generations"].pop("4/4/2") == pytest.approx(whole["generations"].pop("4/4/2"), rel=1e-3)
    assert again == whole


def test_pictures_of_another_guidance_are_drawn_anew(study):
    output, options = study
    row = Row("vae", 1, output)
    file = row.folder / "measures.json"
    values = json.loads(file.read_text())
    assert values["guidance of the pictures"] == 2.0
    file.write_text(json.dumps(values | {"guidance of the pictures": 3.0}))
    expected = pictures_of(row)["samples"]
    measure.keep_pictures(row, samples=torch.zeros(2, 3, 32, 32))
    assert main(["study", *options]) == 0
    assert torch.equal(pictures_of(row)["samples"], expected)
    assert json.loads(file.read_text())["guidance of the pictures"] == 2.0
