"""Weights from outside: every wrapping that scripts and hubs put around a state dict, read by one reader."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from safetensors.torch import save_file
from torch import nn

from aligntok.errors import UserError
from aligntok.models.encoder import Encoder
from aligntok.runtime.published import read_published

STATE = {"blocks.0.attn.qkv.weight": torch.arange(4.0), "norm.weight": torch.ones(2)}
OTHERS = {name: value + 9 for name, value in STATE.items()}  # weights beside their moving averages

WRAPPED = {
    "bare": STATE,
    "state_dict": {"state_dict": STATE, "epoch": 3},
    "two deep": {"state": 0, "model": {"state_dict": STATE}},
    "ema before model": {"model": OTHERS, "ema": STATE, "args": {"lr": 1.0}},
    "an empty ema": {"model": STATE, "ema": {}},
    "DistributedDataParallel": {f"module.{name}": value for name, value in STATE.items()},
    "compiled": {f"_orig_mod.{name}": value for name, value in STATE.items()},
    "compiled under DDP": {f"module._orig_mod.{name}": value for name, value in STATE.items()},
    "DDP under compile": {f"_orig_mod.module.{name}": value for name, value in STATE.items()},
    "compiled block by block": {name.replace("blocks.0.", "blocks.0._orig_mod."): v for name, v in STATE.items()},
    "FSDP": {name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): v for name, v in STATE.items()},
    "checkpointed": {name.replace(".0.", ".0._checkpoint_wrapped_module."): v for name, v in STATE.items()},
    "AveragedModel": {f"module.{name}": value for name, value in STATE.items()} | {"n_averaged": torch.tensor(5)},
    "LitEma": OTHERS
    | {f"model_ema.{name.replace('.', '')}": value for name, value in STATE.items()}
    | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)},
    "averages alone": {f"model_ema.module.{name}": value for name, value in STATE.items()},
}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrappings(wrapping, tmp_path):
    torch.save(WRAPPED[wrapping], tmp_path / "weights.pt")
    assert same(read_published(tmp_path / "weights.pt"))


def test_ldm_averages_of_an_inner_model_replace_its_weights(tmp_path):
    """LDM keeps averages of `self.model` alone, under names without dots; the first stage has none."""
    state = {"model.net.weight": torch.zeros(2), "first_stage.weight": torch.ones(1)}
    torch.save({"state_dict": state | {"model_ema.netweight": torch.full((2,), 3.0)}}, tmp_path / "ldm.ckpt")
    found = read_published(tmp_path / "ldm.ckpt")
    assert found.keys() == state.keys()
    assert found["model.net.weight"].tolist() == [3, 3] and found["first_stage.weight"].item() == 1


def test_an_average_of_no_weight_is_kept_for_the_complaint(tmp_path):
    torch.save(STATE | {"model_ema.unknown": torch.ones(1)}, tmp_path / "w.pt")
    assert read_published(tmp_path / "w.pt").keys() == STATE.keys() | {"model_ema.unknown"}


def shards(folder: Path, variant: str = "", index: str = "model.safetensors.index.json") -> Path:
    parts = {f"model{variant}-0000{i + 1}-of-00002.safetensors": {name: v} for i, (name, v) in enumerate(STATE.items())}
    for file, tensors in parts.items():
        save_file(tensors, folder / file)
    names = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return folder / index


@pytest.mark.parametrize(
    "held",
    [
        ["model.safetensors"],
        ["pytorch_model.bin"],
        ["diffusion_pytorch_model.fp16.safetensors"],
        ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"],
    ],
    ids=str,
)
def test_folders_of_hubs(held, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for file in held:
        state = STATE if file == held[0] else OTHERS
        save = save_file if file.endswith(".safetensors") else torch.save
        save(state, tmp_path / file)
    assert same(read_published(tmp_path))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_sharded_folders(index, tmp_path):
    file = shards(tmp_path, ".fp16" if "fp16" in index else "", index)
    assert same(read_published(tmp_path)) and same(read_published(file))


def _empty(folder: Path) -> Path:
    return folder


def _two(folder: Path) -> Path:
    save_file(STATE, folder / "a.safetensors")
    save_file(STATE, folder / "b.safetensors")
    return folder


def _lacks_a_shard(folder: Path) -> Path:
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def _lacks_a_tensor(folder: Path) -> Path:
    shards(folder)
    save_file({"other": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    return folder


def _no_index(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text("[1]")
    return folder


def _twice(folder: Path) -> Path:
    torch.save(STATE | {f"module.{name}": value for name, value in STATE.items()}, folder / "w.pt")
    return folder / "w.pt"


def _no_tensors(folder: Path) -> Path:
    torch.save({"epoch": 3}, folder / "w.pt")
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_empty, "holds no weights: expected a file ending in .safetensors"),
        (_two, r"holds several weights \(a.safetensors, b.safetensors\): name one"),
        (_lacks_a_shard, "1 of the 2 files .* are missing: model-00002-of-00002"),
        (_lacks_a_tensor, "names 1 tensors that its files do not hold: norm.weight"),
        (_no_index, "is no index of sharded weights"),
        (_twice, "twice, once as module."),
        (_no_tensors, "holds no state dict"),
        (lambda folder: folder / "none.pt", "there is no file"),
    ],
)
def test_refusals_say_what_is_wrong(make, told, tmp_path):
    with pytest.raises(UserError, match=told):
        read_published(make(tmp_path))


def test_an_encoder_takes_a_compiled_ddp_checkpoint_and_a_sharded_fp16_folder(tmp_path):
    encoder = Encoder(tiny_config().encoder)
    state = {name: nn.init.normal_(torch.empty_like(v), std=0.02) for name, v in encoder.backbone.state_dict().items()}
    compiled = {f"module.{name.replace('blocks.1.', 'blocks.1._orig_mod.')}": v for name, v in state.items()}
    torch.save({"ema": compiled, "model": {}}, tmp_path / "compiled.pt")
    halves = {name: value.half() for name, value in state.items()}
    (tmp_path / "hub").mkdir()
    save_file(halves, tmp_path / "hub/model.fp16-00001-of-00001.safetensors")
    names = dict.fromkeys(halves, "model.fp16-00001-of-00001.safetensors")
    (tmp_path / "hub/model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": names}))
    for weights, expected in ((tmp_path / "compiled.pt", state), (tmp_path / "hub", halves)):
        config = tiny_config().encoder
        config.weights = str(weights)
        found = Encoder(config).backbone.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name].float()) for name in expected)
