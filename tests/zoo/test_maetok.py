"""MAETok: sizes, masking, positions, the protocol with latents in a row, and HOG against scikit-image."""

import pytest
import torch
from helpers import tiny_recipe, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.feature import hog as peer_hog
from timm.models.vision_transformer import VisionTransformer

from aligntok.config import FlowConfig, LightningDiTConfig, MAETokConfig
from aligntok.diffusion.flow import training_loss
from aligntok.errors import UserError
from aligntok.evaluation.generation import draw
from aligntok.models.generator import Generator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import choose_precision
from aligntok.training.train_generator import train_generator
from aligntok.zoo.hog import hog, hog_width
from aligntok.zoo.maetok import MAETok, as_mask, draw_hidden


def tiny_config() -> MAETokConfig:
    return MAETokConfig(image_size=32, patch_size=8, latent_tokens=6, latent_channels=5, width=32, depth=2, heads=2)


def tiny_tokenizer() -> MAETok:
    torch.manual_seed(0)
    tokenizer = MAETok(tiny_config()).eval()
    tokenizer.set_statistics(torch.arange(5.0), torch.arange(5.0) + 1)
    return tokenizer


def test_both_halves_are_vit_b():
    """timm's ViT-B/16 without positions, class token and head, plus the learned tokens and the frequencies."""
    with torch.device("meta"):
        tokenizer = MAETok(MAETokConfig())
        vit = VisionTransformer(img_size=256, num_classes=0, class_token=False, pos_embed="none", global_pool="")
        latents = tokenizer.raw_latents(torch.empty(2, 3, 256, 256))
        assert tokenizer.reconstruct(latents).shape == (2, 3, 256, 256)
    count = [sum(p.numel() for p in m.parameters()) for m in (vit, tokenizer.encoder, tokenizer.decoder)]
    frequencies = 12 * 12 * 2 * 32  # blocks, heads, axes, pairs of channels
    assert count[1] == count[0] + 129 * 768 + 768 * 32 + 32 + frequencies
    patches = 768 * 3 * 16 * 16
    assert count[2] == count[0] - patches - 768 + 129 * 768 + 32 * 768 + 768 + frequencies + patches + 768
    assert latents.shape == (2, 32, 1, 128)


@torch.no_grad()
def test_protocol_and_save(tmp_path):
    tokenizer = tiny_tokenizer()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = tokenizer.encode(images)
    assert latents.shape == (2, 5, *tokenizer.grid(images)) == (2, 5, 1, 6)
    torch.testing.assert_close(tokenizer.denormalise(latents), tokenizer.raw_latents(images))
    torch.testing.assert_close(tokenizer.decode(latents), tokenizer.reconstruct(tokenizer.raw_latents(images)))
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(latents))
    before = tokenizer.fingerprint()
    assert loaded.fingerprint() == before
    tokenizer.decoder.out.bias.add_(1)
    assert tokenizer.fingerprint() == before
    tokenizer.encoder.latents.add_(1)
    assert tokenizer.fingerprint() != before


@torch.no_grad()
def test_masked_patches_are_not_seen():
    tokenizer = tiny_tokenizer()
    images = torch.rand(2, 3, 32, 32)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 5] = True  # row 1, column 1
    changed = images.clone()
    changed[:, :, 8:16, 8:16] = -1
    assert torch.equal(tokenizer.raw_latents(images, masked), tokenizer.raw_latents(changed, masked))
    assert not torch.equal(tokenizer.raw_latents(images), tokenizer.raw_latents(changed))
    assert not torch.equal(tokenizer.raw_latents(images), tokenizer.raw_latents(images, masked))


@torch.no_grad()
def test_positions_tell_patches_apart():
    """Swapped patches give other latents; the queries, all alike but for their rotary position, other outputs."""
    tokenizer = tiny_tokenizer()
    images = torch.rand(1, 3, 32, 32)
    swapped = images.roll(8, dims=3)
    assert (tokenizer.raw_latents(images) - tokenizer.raw_latents(swapped)).abs().max() > 1e-4
    outputs = tokenizer.decoder(torch.randn(1, 6, 5))[0]
    distances = torch.cdist(outputs, outputs) + torch.eye(16)
    assert distances.min() > 1e-4


@torch.no_grad()
def test_pixels_go_to_their_patch():
    tokenizer = tiny_tokenizer()
    raw = torch.randn(1, 5, 1, 6)
    pixels = tokenizer.decoder(raw.squeeze(2).transpose(1, 2))[0]  # [16, 3 * 64]
    image = tokenizer.reconstruct(raw)[0]
    assert torch.equal(image[:, 8:16, 16:24], pixels[1 * 4 + 2].view(3, 8, 8))


@settings(max_examples=30)
@given(patches=st.integers(1, 300), seed=st.integers(0, 100), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_masks(patches, seed, ends):
    low, high = sorted(ends)
    torch.manual_seed(seed)
    hidden = draw_hidden(3, patches, low, high)
    masked = as_mask(hidden, patches)
    counts = masked.sum(1)
    assert (counts == hidden.shape[1]).all() and masked.shape == (3, patches)
    assert torch.equal(masked.nonzero()[:, 1].view_as(hidden), hidden), "ascending, as a mask would select them"
    assert low * patches - 1e-3 <= counts[0] <= high * patches + 1.001


def test_masks_follow_the_published_distribution():
    torch.manual_seed(0)
    shares = torch.stack([as_mask(draw_hidden(2, 256, 0.4, 0.6), 256).float().mean() for _ in range(400)])
    assert shares.min() >= 0.4 and shares.max() <= 0.6 + 1 / 256
    # E = .6 - .25 (phi(0) - phi(.8)) / (Phi(0) - Phi(-.8)), plus half a patch for rounding up
    normal = torch.distributions.Normal(0.0, 1.0)
    phi = [normal.log_prob(torch.tensor(x)).exp() for x in (0.0, 0.8)]
    mean = 0.6 - 0.25 * (phi[0] - phi[1]) / (0.5 - normal.cdf(torch.tensor(-0.8)))
    assert shares.mean().item() == pytest.approx(mean.item() + 0.5 / 256, abs=0.006)
    masked = as_mask(draw_hidden(500, 20, 0.5, 0.5), 20)
    assert masked.float().mean(0) == pytest.approx(0.5, abs=0.12)


def test_refusals():
    with pytest.raises(UserError, match="multiple of patch_size"):
        MAETok(MAETokConfig(image_size=40))
    with pytest.raises(UserError, match="try width 640"):
        MAETok(MAETokConfig(width=750, heads=10))
    with pytest.raises(UserError, match="takes 32 x 32 px only"):
        tiny_tokenizer().encode(torch.zeros(1, 3, 32, 40))
    with pytest.raises(UserError, match="aligntok statistics"):
        MAETok(tiny_config()).encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="multiples of patch_size"):
        hog(torch.zeros(1, 3, 20, 32))


def test_a_generator_takes_latents_in_a_row():
    """Rotary positions of neighbours differ by one patch, not by 1/K of one."""
    model = LightningDiT(LightningDiTConfig(size="custom", depth=1, width=32, heads=2, classes=2), 5, (1, 6))
    loss, _ = training_loss(model, torch.randn(2, 5, 1, 6), (torch.zeros(2, dtype=torch.long),), FlowConfig())
    loss.backward()
    assert loss.isfinite() and model.final.linear.weight.grad.abs().sum() > 0
    rope = model._rope((1, 6), torch.device("cpu"))
    torch.testing.assert_close(rope.pair_cos[:, rope.pair_cos.shape[1] // 2], torch.arange(6.0).cos())


def test_a_generator_is_trained_on_a_folder(tmp_path):
    """train_generator takes the grid from the tokenizer, and samples come back as images."""
    tiny_tokenizer().save(tmp_path / "t")
    recipe = tiny_recipe(tmp_path / "run", write_pictures(tmp_path / "pictures", 8))
    recipe.generator.tokenizer = str(tmp_path / "t")
    generator, tokenizer = Generator(train_generator(recipe)), load_tokenizer(tmp_path / "t")
    assert generator.latent_shape == (5, 1, 6)
    drawn = draw(generator, tokenizer, torch.tensor([0, 1]), generator.sampler, choose_precision("cpu", "fp32"))
    assert drawn.shape == (2, 3, 32, 32) and drawn.isfinite().all()


@pytest.mark.parametrize(("patch_size", "size"), [(16, (32, 48)), (8, (16, 24))])
def test_hog_is_that_of_scikit_image(patch_size, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = hog(images, patch_size)
    side = patch_size // 8
    assert found.shape == (2, size[0] // patch_size * size[1] // patch_size, hog_width(patch_size))
    for index, image in enumerate((images + 1) / 2):
        theirs = torch.stack(
            [
                torch.from_numpy(
                    peer_hog(c.numpy(), 9, (8, 8), (1, 1), block_norm="L2", feature_vector=False)[:, :, 0, 0]
                ).float()
                for c in image
            ]
        )  # [3, rows, columns, 9]
        for patch in range(found.shape[1]):
            row, column = divmod(patch, size[1] // patch_size)
            cells = theirs[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            torch.testing.assert_close(found[index, patch], cells.flatten(), atol=1e-5, rtol=1e-5)
