"""Recipes: a base underneath, mistakes named with their file, and every shipped one builds and steps at full size."""

import subprocess
import sys

import pytest
import torch

from aligntok.cli import main, take_plan_options
from aligntok.commands import plan
from aligntok.config import DecoderConfig, EncoderConfig
from aligntok.config.options import SampleConfig
from aligntok.config.parsing import parse_options, parse_recipe
from aligntok.config.recipes import merge, read_recipe, recipe_path, shipped
from aligntok.errors import UserError
from aligntok.models.decoder import Decoder
from aligntok.models.encoder import Encoder

RIVALS = [f"imagenet256_{name}" for name in ("flux", "maetok", "rae", "repa_e", "va_vae", "va_vae_vit", "vae")]
# The study's rows differ from study/base by one value each and are tested in tests/study
SHIPPED = [name for name in shipped() if name not in RIVALS and (name == "study/base" or "study/" not in name)]


def _write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_lies_on_its_base(tmp_path):
    _write(tmp_path, lower="data: {path: a, image_size: 64}\n", upper="base: lower\ndata: {path: b}\n")
    assert read_recipe(tmp_path / "upper.yaml") == {"data": {"path": "b", "image_size": 64}}


def test_a_base_is_found_beside_the_file_and_among_the_shipped(tmp_path):
    (tmp_path / "more").mkdir()
    _write(tmp_path, mine="base: quickstart\noutput: here\n")
    _write(tmp_path / "more", deeper="base: ../mine.yaml\ndata: {flip: false}\n")
    recipe = parse_recipe("train-tokenizer", ["--config", str(tmp_path / "more" / "deeper"), "--data.workers", "3"])
    assert (recipe.output, recipe.data.image_size, recipe.data.flip, recipe.data.workers) == ("here", 64, False, 3)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    """YAML and --option=~/x reach us as they are written, and would make a folder called "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "output: ~/runs/x\ndata: {path: '~/pictures/s-{000..127}.tar'}\ngenerator: {latents: ~/cache}\n"
    text += "tokenizer: {losses: {perceptual: {weights: ~/vgg.pth}}}\n"
    _write(tmp_path, base=text, mine="base: ~/base.yaml\n")
    recipe = parse_recipe("train-generator", ["--config=~/mine", "--generator.tokenizer=~/t"])
    assert recipe.output == f"{tmp_path}/runs/x" and recipe.data.path == f"{tmp_path}/pictures/s-{{000..127}}.tar"
    assert (recipe.generator.latents, recipe.generator.tokenizer) == (f"{tmp_path}/cache", f"{tmp_path}/t")
    assert recipe.tokenizer.losses.perceptual.weights == f"{tmp_path}/vgg.pth"
    options = parse_options("sample", SampleConfig, ["--generator=~/g", "--tokenizer", "~/t", "--labels", "[~/odd]"])
    assert (options.generator, options.tokenizer) == (f"{tmp_path}/g", f"{tmp_path}/t")
    assert take_plan_options(["--json", "~/plan.json"])[0] == {"json": f"{tmp_path}/plan.json"}


def test_null_and_lists_replace_what_the_base_says():
    base = {"a": {"b": [1, 2], "c": 0.9}, "d": {"e": 1}}
    assert merge(base, {"a": {"b": [3], "c": None}}) == {"a": {"b": [3], "c": None}, "d": {"e": 1}}
    assert base["a"]["b"] == [1, 2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: a\n"}, r"a\.yaml: its base leads back to it \(a.yaml -> a.yaml\)"),
        ({"a": "base: b\n", "b": "base: c\n", "c": "base: b\n"}, r"leads back to it \(b.yaml -> c.yaml -> b.yaml\)"),
        ({"a": "base: quikstart\n"}, r"a\.yaml: no recipe 'quikstart'.*did you mean 'quickstart'"),
        ({"a": "base: [quickstart, b]\n"}, r"a\.yaml: base is .*expected the name or the path of one recipe"),
        ({"a": "base: b\n", "b": "data: {pth: x}\n"}, r"b\.yaml: unknown .* data\.pth; did you mean 'data.path'"),
        ({"a": "tokenizer: {stages: {stage2: {stps: 1}}}\n"}, r"did you mean 'tokenizer.stages.stage2.steps'"),
        ({"a": "- data\n"}, r"a\.yaml holds list, expected a mapping"),
        ({"a": "data: {path: [\n"}, r"a\.yaml cannot be read as YAML"),
    ],
)
def test_mistakes_name_their_file(tmp_path, files, message):
    _write(tmp_path, **files)
    with pytest.raises(UserError, match=message) as raised:
        read_recipe(tmp_path / "a.yaml")
    assert "\n" not in str(raised.value)


def test_print_config_shows_the_merged_values_and_reads_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train-tokenizer", "--config", "ablations/w_sp_5", "--print_config"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    printed = parse_recipe("train-tokenizer", ["--config", str(file)])
    assert printed == parse_recipe("train-tokenizer", ["--config", "ablations/w_sp_5"])
    assert printed.tokenizer.stages.stage2.semantic.weight == 5 and printed.data.path == "imagenet/train"


def _difference(name: str, base: str) -> dict:
    def walk(a, b, where=""):
        if isinstance(a, dict) and isinstance(b, dict):
            found = {}
            for key in a.keys() | b.keys():
                found |= walk(a.get(key), b.get(key), f"{where}.{key}".strip("."))
            return found
        return {} if a == b else {where: a}

    found = walk(read_recipe(recipe_path(name)), read_recipe(recipe_path(base)))
    found.pop("output")
    return found


STAGE2 = "tokenizer.stages.stage2"
BASE = "ablations/w_sp_1"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w_sp_0", {f"{STAGE2}.semantic.weight": 0.0}),
        ("w_sp_5", {f"{STAGE2}.semantic.weight": 5.0}),
        ("w_sp_10", {f"{STAGE2}.semantic.weight": 10.0}),
        ("before_adapter", {f"{STAGE2}.semantic.position": "before_adapter"}),
        ("cosine", {f"{STAGE2}.semantic.kind": "cosine"}),
        ("lora", {"tokenizer.model.encoder.lora_rank": 16}),
        ("stage1_only", {f"{STAGE2}.steps": 0}),
        ("no_ema", {f"{STAGE2}.ema_decay": None}),
        ("siglip2", {"tokenizer.model.encoder.name": "vit_large_patch16_siglip_256.v2_webli"}),
        ("mae", {"tokenizer.model.encoder.name": "vit_large_patch16_224.mae"}),
        (
            "decoder_351m",
            {
                "tokenizer.model.decoder.base_channels": 288,
                "tokenizer.model.decoder.channel_multipliers": [1, 2, 4, 4, 4],
            },
        ),
        ("three_stages", {"tokenizer.stages.stage3.steps": 50000}),
    ],
)
def test_an_ablation_changes_one_thing(name, expected):
    assert _difference(f"ablations/{name}", BASE) == expected
    lines = [line for line in recipe_path(f"ablations/{name}").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 3


def test_long_runs_have_qk_norm_and_their_own_guidance():
    for width in ("d32", "d64"):
        long = parse_recipe("train-generator", ["--config", f"imagenet256_f16{width}_800ep"]).generator
        short = parse_recipe("train-generator", ["--config", f"imagenet256_f16{width}"]).generator
        assert (long.steps, short.steps) == (1_000_000, 80_000)
        assert long.model.qk_norm and not short.model.qk_norm
        assert long.sampler.guidance_interval == (0.0, 0.875) and short.sampler.guidance_interval == (0.0, 0.9)
        assert long.tokenizer == f"runs/imagenet256_f16{width}/tokenizer"


def test_no_two_recipes_write_to_one_folder():
    outputs = [read_recipe(path)["output"] for path in shipped().values()]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize(
    ("name", "prefix", "mean"),
    [
        ("vit_large_patch16_siglip_256.v2_webli", 0, (0.5, 0.5, 0.5)),
        ("vit_large_patch16_224.mae", 1, (0.485, 0.456, 0.406)),  # ImageNet's, with which MAE was trained
    ],
)
def test_patch_16_encoders_see_the_image_as_it_is(name, prefix, mean):
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(name=name))
        assert encoder.grid(256, 256) == (16, 16)
        assert encoder(torch.empty(1, 3, 256, 256)).shape == (1, 256, 1024)
    assert (encoder.patch_size, encoder.prefix_tokens, encoder.mean) == (16, prefix, mean)


def test_the_large_decoder_has_about_351_million_parameters():
    config = parse_recipe("train-tokenizer", ["--config", "ablations/decoder_351m"]).tokenizer.model.decoder
    assert config == DecoderConfig(base_channels=288, channel_multipliers=(1, 2, 4, 4, 4))
    with torch.device("meta"):
        count = sum(p.numel() for p in Decoder(32, config).parameters())
    assert count == pytest.approx(351e6, rel=0.02)


def _no_writing(monkeypatch):
    for name in ("write_bytes", "write_text", "mkdir"):
        monkeypatch.setattr(f"pathlib.Path.{name}", lambda self, *_, **__: pytest.fail(f"{self} is written"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_dry_run_of_every_recipe(name, monkeypatch, capsys):
    _no_writing(monkeypatch)
    recipe = parse_recipe("train-tokenizer", ["--config", name])
    stages = [stage for stage in plan.STAGES if getattr(recipe.tokenizer.stages, stage).steps]
    asked, expected = (*plan.STAGES, "generator"), [*stages, "generator"]
    if name.startswith("ablations/") and name != BASE:  # one value differs, and the last stage has it
        asked, expected = tuple(stages[-1:]), stages[-1:]
    found = plan.dry_run(recipe, asked)
    assert list(found["parts"]) == expected
    assert all(row["activations"] > 0 and row["gradients"] > 0 for row in found["rows"])
    assert "nothing was written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["imagenet256_va_vae", "imagenet256_vae"])
def test_the_adversary_of_va_vae_starts_where_its_code_does(name):
    """disc_start 5001 against Lightning's global_step: batch b reads 2 b in the generator's phase, then 2 b + 1."""
    stage = parse_recipe("train-rival", ["--config", name]).rival.stage
    batches = range(stage.steps)
    assert stage.gan_start == next(b for b in batches if 2 * b >= 5001)
    assert stage.discriminator_start == next(b for b in batches if 2 * b + 1 >= 5001)


@pytest.mark.parametrize("name", RIVALS)
def test_a_dry_run_of_every_rival(name, monkeypatch):
    _no_writing(monkeypatch)
    recipe = parse_recipe("train-rival", ["--config", name])
    with pytest.raises(UserError, match=r"trains a rival .* in the place of AlignTok's stages: plan the parts rival"):
        plan.dry_run(recipe, ("stage2",))
    assert plan.parts_of(recipe) == (("rival",) if recipe.rival.kind == "repa-e" else ("rival", "generator"))
    parts = ("rival", "generator") if recipe.rival.kind == "rae" else ("rival",)  # the others have LightningDiT, too
    found = plan.dry_run(recipe, parts)
    assert list(found["parts"]) == list(parts)
    assert {row["parallel"] for row in found["rows"] if row["part"] == "rival"} == {"ddp"}
    assert all(row["activations"] > 0 and row["gradients"] > 0 for row in found["rows"])
    assert all(value > 0 for value in found["forward_flops_per_image"].values())


def test_the_command_line_takes_a_dry_run(tmp_path):
    command = [sys.executable, "-m", "aligntok", "train-generator", "--dry-run", "--config", "quickstart"]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LightningDiT" in done.stdout and "stage1" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_dry_run_trains_what_the_recipe_says():
    parts = {}
    for name in ("ablations/w_sp_1", "ablations/w_sp_0", "ablations/lora"):
        found = plan.dry_run(parse_recipe("train-tokenizer", ["--config", name]), ("stage2",))
        parts[name] = found["parts"]["stage2"]["parameters"]
    assert parts["ablations/w_sp_1"]["encoder"] == (304_367_616, 0)
    assert "snapshot" in parts["ablations/w_sp_1"] and "snapshot" not in parts["ablations/w_sp_0"]
    linears = ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024))  # of each of 24 blocks: qkv, proj, fc1, fc2
    assert parts["ablations/lora"]["encoder"] == (24 * 16 * sum(map(sum, linears)), 304_367_616)


def test_a_rival_is_planned_and_run_dry_from_the_command_line(tmp_path, capsys):
    given = ["--config", "study/vae", "--output", str(tmp_path / "run")]
    assert main(["train-rival", "--dry-run", *given]) == 0
    assert main(["plan", "--gpus", "1", "--parts", "rival", *given]) == 0
    said = capsys.readouterr().out
    assert said.count("rival") >= 2 and "stage1" not in said and not (tmp_path / "run").exists()
