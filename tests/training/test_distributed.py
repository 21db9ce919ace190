"""Two processes train what one trains, under DDP and FSDP2; micro-batches are parts of a batch.

Observed on two gloo processes in fp32: losses within 2e-6 of those of one process, gradient norms and the adaptive
weight within 2e-5, but for Stage 3 behind its first step (see `_amplified`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MACHINE_VALUES, tiny_recipe, tiny_tokenizer, write_pictures
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from aligntok.config import (
    DiscriminatorConfig,
    FlowConfig,
    FluxTransformerConfig,
    GeneratorTrainingConfig,
    LightningDiTConfig,
    LossConfig,
    StageConfig,
    TrainingConfig,
)
from aligntok.diffusion.condition import dropped
from aligntok.diffusion.flow import training_loss
from aligntok.errors import UserError
from aligntok.models.batch_norm import SynchronisedBatchNorm
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.dit_dh import DiTDH
from aligntok.models.flux_transformer import FluxTransformer
from aligntok.models.lightning_dit import LightningDiT
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.world import Place, World
from aligntok.training import distributed
from aligntok.training.conditions import by_label
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.objective import Phase, build_optimizer
from aligntok.training.tokenizer_objective import FrozenInputs, TokenizerObjective
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining

FP32 = choose_precision("cpu", "fp32")
LIMIT = 480  # seconds for all that two processes run: much more than it takes, other work may slow it down


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.rglob("model.safetensors")):
        found |= {f"{file.parent.relative_to(folder)}/{k}": v for k, v in load_file(file).items()}
    return found


def records(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {(r.pop("part"), r.pop("step")): r for r in lines}
    assert len(found) == len(lines), "a step was recorded twice"
    return {key: {k: v for k, v in r.items() if k not in MACHINE_VALUES} for key, r in found.items()}


@pytest.mark.parametrize(("rank", "names"), [(0, {"weight", "bias"}), (1, set())])
def test_weights_to_be_written_are_gathered_in_the_first_process_alone(rank, names, monkeypatch):
    monkeypatch.setattr(distributed, "current", lambda: World(rank, 2))
    assert set(distributed.gather(nn.Linear(2, 3), everywhere=False)) == names
    assert set(distributed.gather(nn.Linear(2, 3))) == {"weight", "bias"}


@pytest.mark.parametrize(
    "build",
    [
        lambda: FluxTransformer(FluxTransformerConfig(32, 2, 2, 3), 4, (4, 4), 8),
        lambda: DiTDH(LightningDiTConfig("custom", 2, 32, 2, classes=3, head_depth=2, head_heads=2), 4, (4, 4)),
    ],
)
def test_fsdp_gathers_one_block_at_a_time(build, monkeypatch):
    """Blocks of every kind are units of their own, shared out before what is around them."""
    units = []
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(distributed, "fully_shard", lambda module, **_: units.append(module))
    with torch.device("meta"):
        model = build()
    distributed.shard({"model": model})
    blocks = list(model.transformer_blocks())
    assert len(blocks) >= 4 and units[: len(blocks)] == blocks and units[len(blocks)] is model


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of the same run in one process, and in two under DDP and FSDP2, all at once."""
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("runs")
    pictures = write_pictures(tmp_path_factory.mktemp("pictures"), 20)
    paths = os.pathsep.join([str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    processes = {}
    for mode in ("ddp", "fsdp"):
        (folder / mode).mkdir()
        command = [*torchrun, str(here / "distributed_run.py"), mode, str(pictures), str(folder / mode)]
        with open(folder / mode / "output.txt", "w") as output:
            environment = os.environ | {"PYTHONPATH": paths}
            processes[mode] = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    recipe = tiny_recipe(folder / "one", pictures)
    TokenizerTraining(recipe).run()
    train_generator(recipe)
    for mode, process in processes.items():
        try:
            process.wait(timeout=LIMIT)
        finally:
            process.terminate()  # torchrun takes its processes along
        assert process.returncode == 0, (folder / mode / "output.txt").read_text()[-3000:]
    return {"one": folder / "one", "ddp": folder / "ddp", "fsdp": folder / "fsdp"}


def _amplified(part: str, step: int) -> bool:
    """Whether Adam has made steps out of rounding before this step.

    Its first step is as long for a gradient of 1e-9 as for one of 1; biases before a GroupNorm have gradients near 0.
    Stages 1 and 2 differ by 1e-5 all the same. Stage 3, which starts from averages, differs by 3e-4 at its second step
    and 7e-3 at its fourth on a processor without AVX-512, and by nothing at its second with an eps of 1e-4 in Adam.
    """
    return part == "stage3" and step > 1


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_log_what_one_does(runs, mode):
    one, two = records(runs["one"]), records(runs[mode] / "straight")
    assert one.keys() == two.keys() and len(one) == 16
    for step, values in one.items():
        assert values.keys() == two[step].keys()
        for name, value in values.items():  # records have six decimals
            weighted = name == "loss" and "gan_weight" in values  # the adaptive weight's rounding is in it
            exact = not weighted and not name.startswith(("grad_norm", "gan_weight"))
            near = 1e-2 if _amplified(*step) else 2e-5 if exact else 2e-4
            assert two[step][name] == pytest.approx(value, rel=near, abs=3e-6), (step, name)
    assert {"gan", "gan_weight", "semantic", "discriminator"} <= one["stage2", 4].keys()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_end_with_the_weights_of_one(runs, mode):
    """Adam turns the rounding of a gradient near 0 into a step of another sign: a few weights may differ by steps."""
    one, two = weights(runs["one"]), weights(runs[mode] / "straight")
    assert one.keys() == two.keys()
    for name, value in one.items():
        difference = (two[name].float() - value.float()).abs()
        assert difference.max() < 4 * 1e-3, f"{name}: beyond four steps"
        assert difference.mean() < 1e-4, f"{name}: on average more than a tenth of a step"


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_micro_batches_of_two_processes_train_the_generator_alike(runs, mode):
    one, parts = records(runs[mode] / "straight"), records(runs[mode] / "parts")
    for (part, step), values in parts.items():
        for name, value in values.items():
            assert one[part, step][name] == pytest.approx(value, rel=2e-4 if "grad" in name else 2e-5, abs=3e-6)
    expected = load_file(runs[mode] / "straight" / "generator" / "model.safetensors")
    for name, value in load_file(runs[mode] / "parts" / "generator" / "model.safetensors").items():
        assert (value - expected[name]).abs().mean() < 1e-5, name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_both_and_the_resumed_run_is_exact(runs, mode):
    for rank in (0, 1):
        codes = json.loads((runs[mode] / f"said-{rank}.json").read_text())["codes"]
        assert [code for code, _ in codes] == [143, 143]
        assert "after step 3" in codes[0][1] and "after step 2" in codes[1][1]
    straight, stopped = weights(runs[mode] / "straight"), weights(runs[mode] / "stopped")
    assert [name for name in straight if not torch.equal(straight[name], stopped[name])] == []
    assert records(runs[mode] / "straight") == records(runs[mode] / "stopped")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_nan_in_one_process_skips_the_step_in_both(runs, mode):
    for rank in (0, 1):
        (message,) = json.loads((runs[mode] / f"said-{rank}.json").read_text())["guard"]
        assert "non-finite loss in phase autoencoder" in message
        assert "(gradient)" not in message, "the process whose rows are sound has only the mean gradient to go by"
    taken = records(runs[mode] / "disturbed")
    assert "l1" not in taken["stage1", 2] and all("l1" in taken["stage1", step] for step in (1, 3, 4))
    assert all(value.isfinite().all() for value in weights(runs[mode] / "disturbed").values())


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_failure_of_the_first_process_is_shared(runs, mode):
    errors = [json.loads((runs[mode] / f"said-{rank}.json").read_text())["failure"] for rank in (0, 1)]
    assert errors == ["the disk is full", "the first process failed: the disk is full"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_only_the_first_process_speaks(runs, mode):
    assert "stage1" in (runs[mode] / "console-0.txt").read_text()
    assert (runs[mode] / "console-1.txt").read_text() == ""


@given(own=st.integers(1, 8), shares=st.integers(1, 6), share=st.floats(0.01, 1.0))
def test_a_share_of_the_batch_is_the_same_rows_however_it_is_divided(own, shares, share):
    total = own * shares
    rows, wanted = Place(0, total, total).chosen(share)
    assert len(rows) == wanted == max(1, round(share * total))
    places = [Place.from_rows(torch.arange(own) + first, total) for first in range(0, total, own)]
    found = [[place.first + i for i in place.chosen(share)[0]] for place in places]
    assert [row for part in found for row in part] == rows
    assert max(map(len, found)) - min(map(len, found)) <= 1, "every process has about as many"


def places(total: int, parts: int) -> list[Place]:
    return [Place(first, total // parts, total) for first in range(0, total, total // parts)]


def test_the_parts_of_a_batch_draw_what_the_whole_draws():
    labels, drawn = torch.arange(40), []
    for place in places(40, 4):
        torch.manual_seed(5)
        drawn.append(dropped((place.of(labels),), (torch.tensor([99]),), 0.5, place)[0])
    torch.manual_seed(5)
    whole = dropped((labels,), (torch.tensor([99]),), 0.5)[0]
    assert torch.equal(torch.cat(drawn), whole) and 5 < (whole == 99).sum() < 35


def test_the_parts_of_a_batch_have_its_flow_matching_loss():
    data, seen = torch.randn(12, 4, 2, 2), []

    class Recorder(nn.Module):
        def forward(self, z, t, labels):
            seen.append(torch.cat([z.flatten(1), t[:, None]], dim=1))
            return z.sin()

    def loss(place, part):
        torch.manual_seed(1)
        return training_loss(Recorder(), part, (torch.zeros(len(part)),), FlowConfig(), place)[0]

    parts = [loss(place, place.of(data)) for place in places(12, 3)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss(None, data))
    assert torch.equal(torch.cat(seen[:3]), seen[3])


def train_briefly(objective, batches) -> list[torch.Tensor]:
    """Losses of a few steps."""
    losses = []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        for phase in objective.phases(step):
            phase.optimizer.zero_grad()
            losses.append(distributed.gradients(phase, batch)[0])
            phase.optimizer.step()
            if phase.taken is not None:
                phase.taken()
        objective.after_step()
    return losses


def generator(training: TrainingConfig) -> GeneratorObjective:
    torch.manual_seed(0)
    model = LightningDiTConfig(size="custom", depth=2, width=32, heads=2, classes=3)
    config = GeneratorTrainingConfig(model=model, training=training, steps=3)
    network = LightningDiT(model, 4, (3, 3))
    for module in (*network.blocks, network.final):  # gates of zero would keep most weights from the loss
        nn.init.normal_(module.modulation.weight, std=0.2)
    nn.init.normal_(network.final.linear.weight, std=0.2)
    return GeneratorObjective(network, lambda batch: batch["images"], by_label(network), config, FP32)


def generator_batches(count: int) -> list[dict]:
    source = torch.Generator().manual_seed(0)
    return [
        {
            "images": torch.randn(8, 4, 3, 3, generator=source),
            "labels": torch.randint(3, (8,), generator=source),
            "rows": torch.arange(8),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_train_the_generator_as_one_batch_does(parts):
    one, several = (generator(TrainingConfig(batch_size=8, accumulate=n)) for n in (1, parts))
    batches = generator_batches(3)
    torch.testing.assert_close(train_briefly(several, batches), train_briefly(one, batches), rtol=1e-5, atol=1e-6)
    for found, expected in zip(several.model.parameters(), one.model.parameters(), strict=True):
        assert (found - expected).abs().mean() < 1e-6


class Distance(nn.Module):
    """Stands for LPIPS: one number per picture."""

    def forward(self, x, y):
        return (x - y).square().mean((1, 2, 3))


def test_micro_batches_have_the_reconstruction_loss_of_one_batch():
    """With noise at the decoder's door and a perceptual loss on a share of the rows."""
    source = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=source) * 2 - 1
    batch = {"images": images, "labels": torch.zeros(4), "rows": torch.arange(4)}
    found = []
    for parts in (1, 2, 4):
        stage = StageConfig(trains=("encoder", "adapter", "decoder"), steps=9, gan_start=9, decoder_noise=0.1)
        losses, training = LossConfig(perceptual_share=0.5), TrainingConfig(batch_size=4, accumulate=parts)
        judge = PatchDiscriminator(DiscriminatorConfig(base_channels=8, layers=1))
        tokenizer = tiny_tokenizer()
        tokenizer.set_statistics(torch.zeros(8), torch.ones(8))  # without them the noise follows each micro-batch
        objective = TokenizerObjective(tokenizer, judge, Distance(), losses, stage, FrozenInputs(), FP32, training)
        torch.manual_seed(7)
        (phase,) = objective.phases(0)
        loss, values = distributed.gradients(phase, batch)
        del values["latent_std"]  # a mean over micro-batches
        found.append([loss, *values.values(), tokenizer.decoder.conv_in.weight.grad])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-6)


def test_micro_batches_train_with_the_adversarial_loss():
    """Each has its own adaptive weight and its own fakes; both phases take a step."""
    batch = {"images": torch.rand(4, 3, 32, 32) * 2 - 1, "labels": torch.zeros(4), "rows": torch.arange(4)}
    judge, tokenizer = PatchDiscriminator(DiscriminatorConfig(base_channels=8, layers=1)), tiny_tokenizer()
    losses, training = LossConfig(lecam_weight=1e-3), TrainingConfig(batch_size=4, accumulate=2)
    stage = StageConfig(trains=("encoder", "adapter", "decoder"), steps=9)
    objective = TokenizerObjective(tokenizer, judge, None, losses, stage, FrozenInputs(), FP32, training)
    before = [p.clone() for p in (judge.layers[0].weight, tokenizer.decoder.conv_in.weight)]
    assert all(loss.isfinite() for loss in train_briefly(objective, [batch]))
    after = (judge.layers[0].weight, tokenizer.decoder.conv_in.weight)
    assert all((a - b).abs().max() > 0 for a, b in zip(after, before, strict=True))
    assert (objective.lecam.means != 0).all() and not objective._fakes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronised_batch_norm_is_batch_norm_in_one_process(dtype):
    torch.manual_seed(0)
    plain, own = nn.BatchNorm2d(5), SynchronisedBatchNorm(5)
    nn.init.normal_(plain.weight)
    own.load_state_dict(plain.state_dict())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for _ in range(2):
        x = (torch.randn(3, 5, 4, 2) + 1).to(dtype)
        found, expected = [], []
        for norm, results in ((own, found), (plain, expected)):
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            results += [y, *torch.autograd.grad(y.float().sin().sum(), [leaf, norm.weight, norm.bias])]
        torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.eval()(x), plain.eval()(x))


def test_refusals(monkeypatch):
    batch = {"labels": torch.zeros(6)}
    with pytest.raises(UserError, match="accumulate is 4, expected a divisor of the 6 rows"):
        distributed.split(batch, 4)
    with pytest.raises(UserError, match="accumulate is 0"):
        distributed.split(batch, 0)
    with pytest.raises(UserError, match="parallel is 'dp', expected ddp or fsdp"):
        distributed.is_sharded("dp")
    for change, message in (
        ({"optimizer": "apex"}, "runs on CUDA and not under fsdp; this run is on cpu"),
        ({"optimizer": "sgd"}, "'sgd', expected adamw or apex"),
        ({"checkpointing": "some"}, "expected one of none, selective, full"),
    ):
        with pytest.raises(UserError, match=message):
            generator(TrainingConfig(batch_size=8, **change))
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(UserError, match=r"cannot be imported .* build it from"):
        build_optimizer([], (0.9, 0.95), TrainingConfig(optimizer="apex"), torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="'cuda:1' under torchrun"), distributed.start("cuda:1"):
        pass
    monkeypatch.setattr(distributed, "current", lambda: World(0, 2))
    alone = Phase("loss", torch.optim.SGD([nn.Parameter(torch.zeros(1))]), lambda batch: None)
    with pytest.raises(UserError, match="single process only"):
        distributed.gradients(alone, batch)
