"""MAETok's objective: losses on hidden patches only, all parts learn, and it runs in the loop."""

import copy

import pytest
import torch
from zoo_helpers import tiny_encoder, tiny_run
from zoo_rivals import tiny_maetok, tiny_maetok_loss

from aligntok.config import DiscriminatorConfig, MAETokLossConfig, RivalConfig, RivalStageConfig, TrainingConfig
from aligntok.data.frozen import FrozenNetwork
from aligntok.errors import UserError
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.runtime.devices import choose_precision
from aligntok.zoo import maetok_objective
from aligntok.zoo.hog import hog
from aligntok.zoo.maetok import MAETok
from aligntok.zoo.maetok_objective import FeatureTarget, MAETokObjective, hog_target

PRECISION = choose_precision("cpu", "fp32")


def objective(
    targets: dict[str, FeatureTarget] | None = None, settings: MAETokLossConfig | None = None, **training
) -> MAETokObjective:
    torch.manual_seed(0)
    if targets is None:
        encoder = tiny_encoder().eval().requires_grad_(False)
        vit = FeatureTarget(FrozenNetwork(encoder, PRECISION), encoder.width)
        targets = {"hog": hog_target(tiny_maetok()), "vit": vit}
    config = RivalConfig(
        kind="maetok",
        maetok=tiny_maetok(),
        maetok_loss=settings or tiny_maetok_loss(),
        stage=RivalStageConfig(steps=3, learning_rate=1e-3, gan_start=1, ema_decay=0.9, gradient_clip=1.0),
        training=TrainingConfig(**{"batch_size": 4} | training),
    )
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=8, layers=1))
    return MAETokObjective(MAETok(config.maetok), discriminator, None, config, PRECISION, targets)


def pictures() -> dict[str, torch.Tensor]:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"images": images, "rows": torch.arange(3)}


def test_feature_losses_are_those_of_hidden_patches(monkeypatch):
    made, batch = objective(settings=tiny_maetok_loss(auxiliary_weight=2.0)), pictures()
    masked = torch.tensor([[True, False, False, True]] * 3)
    drawn = torch.tensor([[0, 3], [0, 3], [0, 3], [1, 2]])  # for the whole batch of four, of which three rows are here
    monkeypatch.setattr(maetok_objective, "draw_hidden", lambda *arguments: drawn)
    _, total, values = made._forward(batch)
    tokens = made.tokenizer.raw_latents(batch["images"], masked).squeeze(2).transpose(1, 2)
    found = made.auxiliary["hog"](tokens)[:, [0, 3]]
    hog_loss = (found - hog(batch["images"])[:, [0, 3]]).square().mean()
    torch.testing.assert_close(values["hog"], hog_loss)
    seen = made.auxiliary["vit"](tokens)[:, [0, 3]]
    wanted = made.targets["vit"].output(batch)[:, [0, 3]]
    vit_loss = 1 - (seen * wanted).sum(-1).div(seen.norm(dim=-1) * wanted.norm(dim=-1)).mean()
    torch.testing.assert_close(values["vit"], vit_loss)
    torch.testing.assert_close(total, 2 * (hog_loss + vit_loss))


def test_gradients_reach_every_part_and_only_features_reach_the_shallow_decoders():
    made, batch = objective(), pictures()
    output, total, _ = made._forward(batch)
    output.mean().backward(retain_graph=True)
    assert all(p.grad is None for p in made.auxiliary.parameters())
    made.autoencoder_optimizer.zero_grad()
    total.backward()
    assert all(p.grad is None for p in made.tokenizer.decoder.parameters())
    for part in (made.tokenizer.encoder, made.auxiliary):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_runs_in_the_loop(tmp_path):
    """Three steps, the last two adversarial; every trained part moves, and the log has every value."""
    made = objective()
    before = {name: [p.clone() for p in part.parameters()] for name, part in made.modules().items()}
    values = tiny_run(made, tmp_path)
    assert {"l1", "hog", "vit", "gan", "gan_weight", "discriminator"} <= values.keys()
    for name in ("encoder", "decoder", "auxiliary", "discriminator"):
        assert any(not torch.equal(a, b) for a, b in zip(before[name], made.modules()[name].parameters(), strict=True))
    made.finish()
    made.tokenizer.save(tmp_path / "t")
    assert not any("auxiliary" in key for key in made.tokenizer.state_dict())


def test_a_row_is_masked_alike_however_the_batch_is_shared_out():
    made, masks = objective({}), []
    forward = made.tokenizer.encoder.forward
    made.tokenizer.encoder.forward = lambda images, masked: masks.append(masked) or forward(images, masked)
    images = torch.zeros(4, 3, 32, 32)
    for rows in ([0, 1, 2, 3], [0, 1], [2, 3]):
        torch.manual_seed(3)
        made._forward({"images": images[rows], "rows": torch.tensor(rows)})
    whole, first, second = masks
    assert torch.equal(whole, torch.cat([first, second])) and whole.sum(1).eq(whole[0].sum()).all()


def test_without_targets_the_pixels_alone_are_learned():
    made = objective({})
    _, total, values = made._forward(pictures())
    assert float(total) == 0 and values.keys() == {"latent_std"} and "auxiliary" not in made.modules()


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_blocks_give_the_same_gradients(checkpointing):
    found = []
    for mode in ("none", checkpointing):
        made = objective(checkpointing=mode)
        torch.manual_seed(1)
        made._reconstruction_loss(pictures())[0].backward()
        found.append(copy.deepcopy([p.grad for p in made.together.parameters()]))
        made.finish()
        assert all("forward" not in vars(block) for block in made.blocks())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_refusals():
    with pytest.raises(UserError, match="mask_share"):
        objective(settings=MAETokLossConfig(mask_share=(0.6, 0.4)))
    with pytest.raises(UserError, match=r"target odd gives features \[3, 5, 7\], expected \[3, 4, 7\]"):
        objective({"odd": FeatureTarget(lambda batch: torch.zeros(3, 5, 7), 7)})._forward(pictures())
