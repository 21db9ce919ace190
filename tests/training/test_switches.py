"""Every switch of a recipe through the real commands: alone, and in the pairs that are used together.

Blocks are compiled by "aot_eager", which traces and differentiates them as the default does and leaves out Inductor's
code; `test_inductor_trains` takes the default.
"""

import dataclasses
import json
from functools import partial
from typing import Any, get_type_hints

import apex_stand_in
import pytest
import torch
from switch_table import ELSEWHERE, HEAD, SWITCHES, WORDS_ELSEWHERE, trunks
from switches import Bench, Switch, interrupted, near, same, sound

from aligntok.config import Recipe, SpikeConfig
from aligntok.config.from_dict import from_dict
from aligntok.config.ranges import _words


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    torch._dynamo.reset()
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def weights_of_lpips(tmp_path_factory) -> dict[str, str]:
    return trunks(tmp_path_factory.mktemp("trunks"))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """apex is there, and compiling is quick."""
    apex_stand_in.install(monkeypatch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_a_switch_alone(switch, bench, request):
    perceptual = switch.fields.get("tokenizer.losses.perceptual")
    if perceptual and not perceptual["kind"].startswith("st-"):
        perceptual["weights"] = request.getfixturevalue("weights_of_lpips")[perceptual["kind"]]
    bench.check(switch)


CACHED = "generator.latents"  # set to the folder of a cache
COMPILE, ACCUMULATE = {"training.compile": True}, {"training.accumulate": 2}
PAIRS = [
    ("generator", COMPILE | {"training.checkpointing": "full"}, {}),
    ("generator", COMPILE | {"training.checkpointing": "selective"}, {}),
    ("generator", COMPILE | ACCUMULATE, {}),
    ("generator", ACCUMULATE | {"training.checkpointing": "full"}, {}),
    ("generator", COMPILE | ACCUMULATE | {"training.checkpointing": "selective"}, {}),
    ("generator", COMPILE | {"training.preview_every": 1}, {}),
    ("generator", COMPILE | {"training.optimizer": "apex"}, {}),
    ("generator", COMPILE, HEAD | {"model.qk_norm": True}),
    ("generator", COMPILE | {"training.checkpointing": "full"}, HEAD),
    ("generator", COMPILE, {"training.precision": "bf16"}),
    ("generator", COMPILE, {CACHED: True}),
    ("generator", COMPILE | ACCUMULATE | {"training.checkpointing": "full"}, {CACHED: True}),
    ("tokenizer", COMPILE | {"training.checkpointing": "selective"}, {}),
    ("tokenizer", COMPILE | {"training.checkpointing": "full"}, {"model.encoder.lora_rank": 2}),
    ("tokenizer", COMPILE | {"training.checkpointing": "full"}, ACCUMULATE),
    ("tokenizer", COMPILE | {"training.preview_every": 1}, {"stages.stage2.ema_decay": None}),
    ("tokenizer", {"training.checkpointing": "full"}, {"training.precision": "bf16", "crop": "random"}),
]


@pytest.mark.parametrize(("command", "fields", "beside"), PAIRS, ids=str)
def test_switches_together(command, fields, beside, bench):
    """What has no say in the result has none together, nor beside other switches."""
    fields, beside = ({f"{command}.{k}": v for k, v in part.items()} for part in (fields, beside))
    if beside.pop(f"generator.{CACHED}", False):
        beside[CACHED] = str(bench.cache)
    bench.check(Switch(command, fields, near, beside))


def test_latents_of_a_cache_are_those_of_the_encoder(bench):
    """In bf16, so that losses are near and weights not to the bit."""
    cached = bench.plain("generator", {CACHED: str(bench.cache)})
    sound(cached)
    plain = bench.plain("generator", {})
    for one, two in zip(cached.records, plain.records, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-2)


@pytest.mark.parametrize("fields", [{}, COMPILE], ids=str)
def test_stage_3_on_a_latent_cache(fields, bench):
    """A whole run whose last stage reads a cache of the stage before it."""
    stages = {"stages.stage3.steps": 2, "stages.stage3.gan_start": 1, "stages.stage3.trains": ["decoder"]}
    made = bench.plain("tokenizer", {})
    again = {f"tokenizer.{name}": value for name, value in (stages | fields).items()}
    found = bench.run("tokenizer", again | {"tokenizer.stages.stage3.latents": str(bench.cache)}, output=made.folder)
    assert found.status == 0 and "no MFU" not in found.said, found.said
    assert [record["step"] for record in found.records if record["part"] == "stage3"] == [1, 2]
    for name in ("stage3", "tokenizer/model.safetensors"):
        assert (found.folder / name).exists()
    (found.folder / "stage3").rename(found.folder / f"stage3-{len(fields)}")


@pytest.mark.parametrize("command", ["generator", "tokenizer"])
@pytest.mark.parametrize("more", [{"training.optimizer": "apex"}, COMPILE | {"training.checkpointing": "selective"}])
def test_a_resumed_run_ends_as_an_uninterrupted_one(command, more, bench, monkeypatch):
    fields = {f"{command}.{name}": value for name, value in (more | {"training.preview_every": 1}).items()}
    plain = bench.plain(command, fields)
    resumed = interrupted(bench, command, fields, monkeypatch)
    sound(resumed)
    assert "resumed at step 2" in resumed.said
    same(resumed, plain)


def test_inductor_trains(bench, tmp_path, monkeypatch):
    """The compiler that users have: weights near those of plain blocks, and an interrupted run's to the bit."""
    monkeypatch.undo()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    fields = {"generator.training.compile": True, "generator.training.checkpointing": "selective"}
    compiled = bench.run("generator", fields)
    sound(compiled)
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"
    near(compiled, bench.plain("generator", {}))
    same(interrupted(bench, "generator", fields, monkeypatch), compiled)


def test_a_layer_that_goes_bad_is_named_in_compiled_blocks_too(bench):
    fields = {"generator.training.compile": True, "generator.training.nonfinite_limit": 1}
    found = bench.run("generator", fields | {"generator.learning_rate": 1e38})
    assert found.status == 2
    assert "first at model." in found.said, found.said


def fields_of(config: Any, where: str = "") -> dict[str, tuple[type, str]]:
    """Dotted names of all values in a configuration -> class and name of the field."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        inner = fields_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: (type(config), field.name)}
        found |= inner
    return found


def everything() -> dict[str, tuple[type, str]]:
    recipe = Recipe()
    recipe.generator.training.spike = recipe.tokenizer.training.spike = recipe.rival.training.spike = SpikeConfig()
    return fields_of(recipe)


def turned() -> set[tuple[type, str]]:
    """All fields that a switch turns, by class and name."""
    known, found = everything(), set()
    for switch in SWITCHES:
        for name, value in switch.fields.items():
            names = [f"{name}.{key}" for key in value] if isinstance(value, dict) else [name]
            found |= {known[one] for one in names}
    return found


def test_every_field_of_a_recipe_is_turned_here_or_elsewhere():
    known, done = everything(), turned()
    named = {known[name] for name in ELSEWHERE if isinstance(name, str)}
    named |= {name for name in ELSEWHERE if isinstance(name, tuple)}
    untouched = {(kind, name) for kind, name in known.values()} - done - named
    assert {f"{kind.__name__}.{name}" for kind, name in untouched if kind not in ELSEWHERE} == set()
    assert named & done == set(), "turned here, so that the reason is none"


def test_every_word_of_a_field_is_said_here_or_elsewhere(bench):
    known, said = everything(), set()
    recipes = [bench.recipe("tokenizer", {}), *(bench.recipe("rival", {}, kind) for kind in ("vae", "rae"))]
    values = [(name, value) for switch in SWITCHES for name, value in (switch.fields | switch.beside).items()]
    for recipe in recipes:
        values += [(name, value) for name, value in flat(dataclasses.asdict(recipe))]
    for name, value in values:
        for one, word in flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]:
            said |= {(known[one], w) for w in (word if isinstance(word, list | tuple) else [word]) if one in known}
    kinds = {switch.kind for switch in SWITCHES if switch.command == "rival"}
    said |= {(known["rival.kind"], kind) for kind in kinds}
    for kind, name in set(known.values()):
        words = set(_words(get_type_hints(kind)[name]))
        unsaid = {word for word in words if ((kind, name), word) not in said and word not in WORDS_ELSEWHERE}
        assert unsaid == set(), (kind.__name__, name)


def flat(data: dict[str, Any], where: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in data.items():
        found += flat(value, f"{where}{key}.") if isinstance(value, dict) else [(f"{where}{key}", value)]
    return found


def test_the_values_of_the_table_are_what_a_file_would_hold():
    for switch in SWITCHES:
        assert json.loads(json.dumps(switch.fields)) == switch.fields
    assert from_dict(Recipe, {}) == Recipe()
