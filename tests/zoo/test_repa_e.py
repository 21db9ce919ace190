"""REPA-E: which loss reaches which network, the bridge's statistics, shared noise, and the loop."""

import copy

import pytest
import torch
from torch.nn import functional as F
from zoo_helpers import tiny_encoder, tiny_run

from aligntok.config import (
    DecoderConfig,
    DiscriminatorConfig,
    FlowConfig,
    GeneratorTrainingConfig,
    LightningDiTConfig,
    LossConfig,
    MAETokConfig,
    RepaEConfig,
    RivalConfig,
    RivalStageConfig,
    TrainingConfig,
    VAEConfig,
)
from aligntok.data.frozen import FrozenNetwork
from aligntok.errors import UserError
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import choose_precision
from aligntok.zoo import repa_e
from aligntok.zoo.maetok import MAETok
from aligntok.zoo.repa_e import AlignedGenerator, Bridge, RepaEObjective
from aligntok.zoo.vae import VAE, scale_and_shift

PRECISION = choose_precision("cpu", "fp32")


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Away from the zeros that modulations and output start with, so that gradients reach everything."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def objective(steps: int = 3, training: dict | None = None, clip: float | None = None, **changes) -> RepaEObjective:
    """`changes` are of RepaEConfig; the adversary is there from the first step."""
    torch.manual_seed(0)
    network = DecoderConfig(base_channels=8, channel_multipliers=(1, 2), blocks=1, groups=4, attention_levels=())
    tokenizer = VAE(VAEConfig(latent_channels=3, networks=network))
    scale_and_shift(tokenizer, 2.0, 0.1)
    model = LightningDiTConfig(size="custom", depth=3, width=32, heads=2, patch_size=2, classes=2)
    config = RivalConfig(
        kind="repa-e",
        kl_weight=1e-3 * 3 * 16 * 16,
        losses=LossConfig(gan_weight=0.1),
        stage=RivalStageConfig(steps=steps, gan_start=0, gradient_clip=clip),
        training=TrainingConfig(**{"batch_size": 4, "precision": "fp32"} | (training or {})),
        repa_e=RepaEConfig(**{"depth": 2, "projector_width": 24} | changes),
    )
    flow = FlowConfig(time_sampling="uniform", direction_weight=0.0)
    generator = GeneratorTrainingConfig(model=model, flow=flow, ema_decay=0.9)
    model = randomised(LightningDiT(model, 3, (8, 8)))
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=8, layers=1))
    features = FrozenNetwork(tiny_encoder(4), PRECISION)  # 16 px images at f4: 4 x 4 tokens
    return RepaEObjective(tokenizer, discriminator, None, config, PRECISION, model, generator, features, 192)


def pictures() -> dict[str, torch.Tensor]:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"images": images, "labels": torch.tensor([0, 1, 0]), "rows": torch.arange(3)}


def tokenizers_phase(made: RepaEObjective, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and backward pass of the tokenizer's phase of a step, the others left out; its values."""
    found = {}
    for phase in made.phases(0):
        if phase.name == "autoencoder":
            loss, found = phase.loss(batch)
            loss.backward()
    return found


def gradients(module: torch.nn.Module) -> list[torch.Tensor | None]:
    return [p.grad for p in module.parameters() if p.requires_grad]


def test_the_tokenizers_loss_reaches_the_tokenizer_alone():
    made = objective()
    values = tokenizers_phase(made, pictures())
    assert {"l1", "kl", "gan", "align_tokenizer", "latent_std"} == values.keys()
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(made.tokenizer))
    for held in (made.generator, made.discriminator, made.bridge):
        assert all(g is None for g in gradients(held))
    assert all(p.requires_grad for p in made.discriminator.parameters())
    assert all(p.requires_grad for n, p in made.generator.named_parameters() if "positions" not in n)
    assert not made.model.positions.requires_grad


def test_alignment_reaches_the_encoder_and_not_the_decoder():
    """With and without it the decoder's gradients are equal and the encoder's are not."""
    found = []
    for weight in (0.0, 1.5):
        made = objective(tokenizer_weight=weight)
        torch.manual_seed(2)
        tokenizers_phase(made, pictures())
        found.append(made.tokenizer)
    without, with_alignment = found
    for a, b in zip(gradients(without.decoder), gradients(with_alignment.decoder), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(without.encoder), gradients(with_alignment.encoder), strict=True):
        assert not torch.allclose(a, b, rtol=1e-3, atol=0)


def test_the_diffusion_loss_never_reaches_the_tokenizer():
    made, batch = objective(), pictures()
    made._adversarial_loss(batch)
    loss, _ = made._generator_loss(batch)
    loss.backward()
    assert all(g is None for g in gradients(made.tokenizer)) and all(g is None for g in gradients(made.discriminator))
    assert all(g is not None for g in gradients(made.generator))
    assert all(g.abs().sum() > 0 for g in gradients(made.generator.projector))
    made._discriminator_loss(batch)[0].backward()
    assert all(g is None for g in gradients(made.tokenizer))
    assert all(g is not None for g in gradients(made.discriminator))


def test_the_bridge_starts_from_the_tokenizer_and_moves_in_the_generators_phase():
    made, batch = objective(), pictures()
    mean, variance = made.bridge.running_mean.clone(), made.bridge.running_var.clone()
    torch.testing.assert_close(mean, torch.full((3,), 0.1))
    torch.testing.assert_close(variance, torch.full((3,), 0.25))
    made._adversarial_loss(batch)
    assert torch.equal(made.bridge.running_mean, mean) and torch.equal(made.bridge.running_var, variance)
    raw = made._draws[0].latents
    made._generator_loss(batch)
    torch.testing.assert_close(made.bridge.running_mean, 0.9 * mean + 0.1 * raw.mean((0, 2, 3)))
    flat = raw.transpose(0, 1).flatten(1)
    torch.testing.assert_close(made.bridge.running_var, 0.9 * variance + 0.1 * flat.var(1))


def test_both_phases_see_the_same_times_and_noise(monkeypatch):
    made, batch = objective(), pictures()
    calls = []
    original = repa_e.flow_interpolate
    monkeypatch.setattr(
        repa_e,
        "flow_interpolate",
        lambda data, t, key, **more: calls.append((data, t, key)) or original(data, t, key, **more),
    )
    made._adversarial_loss(batch)
    made._generator_loss(batch)
    (running, t1, key1), (normalised, t2, key2) = calls
    assert torch.equal(t1, t2) and torch.equal(key1, key2)
    expected = (made._draws[0].latents - 0.1) / (0.25 + made.bridge.eps) ** 0.5
    torch.testing.assert_close(running, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert not normalised.requires_grad and running.requires_grad


def test_labels_are_dropped_in_the_generators_phase_alone():
    made, batch = objective(), pictures()
    made.model.config.label_dropout = 1.0
    seen = []
    made.model.label.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    made._adversarial_loss(batch)
    made._generator_loss(batch)
    assert torch.equal(seen[0], batch["labels"]) and torch.equal(seen[1], torch.full((3,), made.model.null_class))


def test_every_gradient_is_clipped_at_the_stages_norm():
    made = objective()
    assert [phase.gradient_clip for phase in made.phases(0)] == [None, None, 1.0], "the generator has a norm of its own"
    made = objective(clip=0.5)
    assert [phase.name for phase in made.phases(0)] == ["autoencoder", "discriminator", "generator"]
    assert [phase.gradient_clip for phase in made.phases(0)] == [0.5, 0.5, 1.0]


def test_losses_are_those_of_the_formula():
    made, batch = objective(), pictures()
    made._adversarial_loss(batch)
    draws, reference = made._draws[0], copy.deepcopy(made)
    loss, values = made._generator_loss(batch)
    data = (draws.latents - draws.latents.mean((0, 2, 3), keepdim=True)) / (
        draws.latents.var((0, 2, 3), correction=0, keepdim=True) + reference.bridge.eps
    ).sqrt()
    zero = repa_e.flow_interpolate(torch.zeros_like(data), torch.ones(3), draws.key)  # the noise itself
    t = draws.t.view(-1, 1, 1, 1)
    velocity, projected = reference.generator((1 - t) * data + t * zero, draws.t, draws.labels)
    torch.testing.assert_close(values["mse"], F.mse_loss(velocity, zero - data), atol=1e-4, rtol=1e-4)
    features = F.normalize(draws.features, dim=-1)
    align = 1 - (F.normalize(projected, dim=-1) * features).sum(-1).mean()
    torch.testing.assert_close(values["align_generator"], align, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, values["mse"] + 0.5 * values["align_generator"])


@torch.no_grad()
def test_the_projection_needs_only_the_front_blocks():
    torch.manual_seed(0)
    config = LightningDiTConfig(size="custom", depth=3, width=32, heads=2, classes=2)
    aligned = AlignedGenerator(randomised(LightningDiT(config, 3, (4, 4))), 2, 24, 7).eval()
    z, t, labels = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 2])
    velocity, projected = aligned(z, t, labels)
    assert projected.shape == (2, 16, 7)
    torch.testing.assert_close(velocity, aligned.model(z, t, labels))
    ran = []
    for index, block in enumerate(aligned.model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    torch.testing.assert_close(aligned.project(z, t, labels), projected)
    assert ran == [0, 1] and len(aligned.model.blocks) == 3


def test_runs_in_the_loop_and_leaves_a_tokenizer(tmp_path):
    made = objective()
    before = {name: copy.deepcopy(module.state_dict()) for name, module in made.modules().items()}
    values = tiny_run(made, tmp_path / "run", size=16, checkpoint_every=1)
    assert {"l1", "align_tokenizer", "align_generator", "mse", "discriminator", "grad_norm_generator"} <= values.keys()
    assert all(torch.tensor(v).isfinite() for k, v in values.items() if isinstance(v, float))
    for name, module in made.modules().items():
        assert any(not torch.equal(value, before[name][key]) for key, value in module.state_dict().items()), name
    made.finish()
    torch.testing.assert_close(made.tokenizer.latent_mean, made.bridge.running_mean)
    made.tokenizer.save(tmp_path / "t")
    loaded, images = load_tokenizer(tmp_path / "t"), pictures()["images"]
    with torch.no_grad():
        found = made.bridge.eval()(made.tokenizer.raw_latents(images))
        torch.testing.assert_close(loaded.encode(images), found, atol=1e-5, rtol=1e-5)


def test_resumes_to_the_bit(tmp_path):
    straight = objective()
    tiny_run(straight, tmp_path / "a", size=16)
    first = objective(steps=3)
    first.steps = 2
    tiny_run(first, tmp_path / "b", size=16, checkpoint_every=1)  # the checkpoint of step 1 stays
    resumed = objective()
    tiny_run(resumed, tmp_path / "b", size=16)
    for name, module in straight.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed.modules()[name].state_dict()[key]), (name, key)


def test_refusals():
    with pytest.raises(UserError, match="has 3 blocks"):
        objective(depth=8)
    config = MAETokConfig(image_size=16, patch_size=8, latent_tokens=2, latent_channels=2, width=8, depth=1, heads=1)
    made = objective()
    before = (made.discriminator, None, made.config, PRECISION)
    behind = (made.model, made.settings, made.features, 192)
    with pytest.raises(UserError, match="MAETok has no posterior"):
        RepaEObjective(MAETok(config), *before, *behind)
    tokenizer = made.tokenizer
    tokenizer.latent_std.fill_(float("nan"))
    with pytest.raises(UserError, match="aligntok statistics"):
        RepaEObjective(tokenizer, *before, *behind)
    made.features = lambda batch: torch.zeros(3, 9, 192)
    with pytest.raises(UserError, match=r"features \[3, 9, 192\].*\[3, 16, 192\]"):
        made._adversarial_loss(pictures())


def test_the_bridge_is_a_batch_norm():
    torch.manual_seed(0)
    mean, std, x = torch.randn(3), torch.rand(3) + 0.5, torch.randn(4, 3, 5, 6) * 3 + 1
    peer = torch.nn.BatchNorm2d(3, eps=1e-4, affine=False, momentum=0.3)  # train_repae.py's eps
    peer.running_mean.copy_(mean)
    peer.running_var.copy_(std.square())
    ours = Bridge(mean, std, 0.3)
    torch.testing.assert_close(ours(x), peer(x))
    torch.testing.assert_close(ours.running_mean, peer.running_mean)
    torch.testing.assert_close(ours.running_var, peer.running_var)
    torch.testing.assert_close(ours.eval()(x), peer.eval()(x))
    shift, scale = ours.statistics
    torch.testing.assert_close(ours(x), (x - shift[:, None, None]) / scale[:, None, None])


def test_rows_have_the_same_draws_however_the_batch_is_shared_out():
    """A step in two micro-batches sees the times, labels and latents of the step in one."""
    found = []
    for rows in ([0, 1, 2, 3], [0, 1], [2, 3]):
        made = objective()
        torch.manual_seed(4)
        images = torch.linspace(-1, 1, 4 * 3 * 256).view(4, 3, 16, 16)[rows]
        labels = torch.tensor([0, 1, 1, 0])[rows]
        made._reconstruction_loss({"images": images, "labels": labels, "rows": torch.tensor(rows)})
        found.append(made._draws[rows[0]])
    for name in ("latents", "t", "labels"):
        whole, first, second = (getattr(draws, name) for draws in found)
        torch.testing.assert_close(whole, torch.cat([first, second]), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0].key, found[2].key)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_blocks_give_the_same_gradients(checkpointing):
    found = []
    for mode in ("none", checkpointing):
        made, batch = objective(training={"checkpointing": mode}), pictures()
        torch.manual_seed(1)
        for phase in made.phases(0):
            phase.loss(batch)[0].backward()
        found.append([*gradients(made.together), *gradients(made.generator)])
        made.finish()
        assert all("forward" not in vars(block) for block in made.model.blocks)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
