"""The once-through adversarial gradient equals VQGAN's twice-through one."""

import torch
from torch import nn

from aligntok.kernels import discriminator_loss
from aligntok.losses.adversarial import DELTA, LeCam, adaptive_weight, image_gradient, surrogate


def build() -> tuple[nn.Sequential, nn.Conv2d, nn.Module, nn.Module]:
    torch.manual_seed(0)
    last = nn.Conv2d(6, 3, 3, padding=1)
    decoder = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), last)
    critic = nn.Sequential(nn.Conv2d(3, 5, 3), nn.LeakyReLU(0.2), nn.Conv2d(5, 1, 3))
    perceptual = nn.Conv2d(3, 7, 3).requires_grad_(False)
    return decoder, last, critic, perceptual


def losses(output, target, critic, perceptual):
    reconstruction = (output - target).abs().mean() + (perceptual(output) - perceptual(target)).square().mean()
    return reconstruction, -critic(output).mean()


def test_equals_differentiating_the_sum_directly():
    decoder, last, critic, perceptual = build()
    z, target = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
    output = decoder(z)
    reconstruction, adversarial = losses(output, target, critic, perceptual)
    norms = [
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    expected_weight = norms[0] / (norms[1] + DELTA)
    expected = torch.autograd.grad(reconstruction + 0.5 * expected_weight * adversarial, list(decoder.parameters()))

    output = decoder(z)
    image = output.detach().requires_grad_()
    gradients = [image_gradient(loss, image) for loss in losses(image, target, critic, perceptual)]
    weight = adaptive_weight(output, last.weight, *gradients, limit=1e4)
    total = surrogate(output, gradients[0] + 0.5 * weight * gradients[1], torch.tensor(3.0))
    assert total.item() == 3.0
    total.backward()
    torch.testing.assert_close(weight, expected_weight)
    for parameter, gradient in zip(decoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad is None for p in critic.parameters()), "the generator's phase must not touch the discriminator"


def test_weight_is_clamped_and_carries_no_gradient():
    decoder, last, _, _ = build()
    output = decoder(torch.randn(1, 4, 8, 8))
    weight = adaptive_weight(output, last.weight, torch.ones_like(output), torch.zeros_like(output), limit=7.0)
    assert weight.item() == 7.0
    assert not weight.requires_grad


def test_lecam_averages_follow_the_logits_and_are_saved():
    lecam = LeCam(decay=0.9)
    real, fake = torch.full((8,), 3.0), torch.full((8,), -1.0)
    for step in range(3):
        _, stats = discriminator_loss(real, fake, lecam_means=lecam.means, lecam_weight=0.1)
        lecam.update(stats)
        torch.testing.assert_close(lecam.means, torch.tensor([3.0, -1.0]) * (1 - 0.9 ** (step + 1)))
    before = lecam.means.clone()
    lecam.update(torch.tensor([float("nan"), float("inf"), 0.5, 0.5]))
    assert torch.equal(lecam.means, before)
    other = LeCam(decay=0.9)
    other.load_state_dict(lecam.state_dict())
    assert torch.equal(other.means, lecam.means) and not list(lecam.parameters())


def test_lecam_update_leaves_a_pending_backward_alone():
    lecam = LeCam(decay=0.5)
    lecam.means.copy_(torch.tensor([0.5, -0.5]))
    gradients = {}
    for implementation in ("cpp", "reference"):
        torch.manual_seed(0)
        logits = [torch.randn(9).requires_grad_() for _ in range(2)]
        averages = LeCam(decay=0.5)
        averages.load_state_dict(lecam.state_dict())
        loss, stats = discriminator_loss(
            *logits, lecam_means=averages.means, lecam_weight=0.3, implementation=implementation
        )
        averages.update(stats)
        gradients[implementation] = torch.autograd.grad(loss, logits)
    for one, other in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(one, other)
