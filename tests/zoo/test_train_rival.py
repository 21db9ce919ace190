"""Rivals in the one loop: what each trains, its losses, resuming, and a generator on its latents."""

import copy
import io
import signal
import warnings

import pytest
import torch
from helpers import write_pictures
from PIL import Image
from safetensors.torch import load_file
from zoo_rivals import rival_recipe, tiny_maetok_loss, tiny_vae, tiny_vit

from aligntok.config.parsing import parse_recipe
from aligntok.data.images import load_center_crops, open_images
from aligntok.errors import UserError
from aligntok.evaluation.generation import check_pair, draw
from aligntok.losses.adversarial import DELTA
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.generator import Generator, generator_class
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import choose_precision
from aligntok.training.monitoring.previews import TokenizerPreview
from aligntok.training.monitoring.telemetry import PartLog, Telemetry
from aligntok.training.recovery.guard import Interrupted
from aligntok.training.train_generator import train_generator
from aligntok.zoo.converters.flux import flux_config
from aligntok.zoo.objectives import RAEObjective, VAEObjective, VAVAEObjective
from aligntok.zoo.repa_e import Bridge, RepaEObjective
from aligntok.zoo.train_rival import build_rival, train_rival
from aligntok.zoo.vae import VAE


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 20)


def objective(kind: str, folder, pictures, **changes):
    """An objective of that kind and a batch; its frozen encoder's tokens are random."""
    recipe = rival_recipe(folder, pictures, kind, **changes).rival
    tokenizer = build_rival(recipe).eval()
    common = (tokenizer, PatchDiscriminator(recipe.losses.discriminator), None, recipe, choose_precision("cpu", "fp32"))
    random = torch.Generator().manual_seed(1)
    batch = {"images": torch.rand(4, 3, 32, 32, generator=random) * 2 - 1, "rows": torch.arange(4)}
    batch["labels"] = torch.zeros(4, dtype=torch.int64)
    if kind == "vae":
        return VAEObjective(*common), batch
    if kind == "rae":
        return RAEObjective(*common, lambda batch: tokenizer.raw_latents(batch["images"]).detach()), batch
    features = torch.randn(4, 4, 24, generator=random)
    return VAVAEObjective(*common, lambda batch: features, 24), batch


def gradients(made, loss) -> set[str]:
    """Names of the tokenizer's parts that a loss reaches."""
    loss.backward()
    return {name.split(".")[0] for name, p in made.tokenizer.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("vae", {"encoder", "quant", "post_quant", "decoder"}),
        ("va-vae", {"encoder", "quant", "post_quant", "decoder"}),
        ("rae", {"decoder"}),
    ],
)
def test_what_is_trained(kind, parts, adversarial, tmp_path, pictures):
    made, batch = objective(kind, tmp_path, pictures)
    loss, _ = made._adversarial_loss(batch) if adversarial else made._reconstruction_loss(batch)
    assert gradients(made, loss) == parts
    assert all(p.grad is None for p in made.discriminator.parameters())


def test_kl_is_ldms_per_pixel(tmp_path, pictures):
    made, batch = objective("vae", tmp_path, pictures, kl_weight=100.0)
    torch.manual_seed(3)
    output, kl, _ = made._forward(batch)
    posterior = made.tokenizer.posterior(batch["images"])
    torch.testing.assert_close(kl, 100 * posterior.kl().mean() / (3 * 32 * 32))
    torch.manual_seed(3)
    noise = made._draw(batch, posterior.mean)
    torch.testing.assert_close(output, made.tokenizer.reconstruct(posterior.sample(noise)))


def test_alignment_weighs_as_much_as_the_reconstruction_at_the_encoder(tmp_path, pictures):
    """weight * |d alignment / dE| = w * |d L_rec / dE|, whatever the two losses are."""
    made, batch = objective("va-vae", tmp_path, pictures, kl_weight=0.0)
    torch.manual_seed(0)
    latents, output, _, _ = made._pass(batch)
    reconstruction, _ = made._reconstruction(output, batch)
    at = made.tokenizer.encoder.conv_out.weight
    (of_reconstruction,) = torch.autograd.grad(reconstruction, at, retain_graph=True)
    (by_image,) = torch.autograd.grad(reconstruction, output, retain_graph=True)
    loss, values = made._alignment(batch, latents, output, by_image)
    (of_alignment,) = torch.autograd.grad(loss, at, retain_graph=True)
    torch.testing.assert_close(of_alignment.norm(), 0.1 * of_reconstruction.norm(), rtol=1e-2, atol=DELTA)
    torch.testing.assert_close(loss.detach(), values["alignment"] * values["alignment_weight"])
    torch.manual_seed(0)
    total, _ = made._reconstruction_loss(batch)
    torch.testing.assert_close(total.detach(), (reconstruction + loss).detach())


def test_rae_noise_is_uniform_up_to_tau_and_only_for_training(tmp_path, pictures):
    made, batch = objective("rae", tmp_path, pictures)
    seen = []
    made.tokenizer.reconstruct = lambda raw: seen.append(raw) or torch.zeros(len(raw), 3, 32, 32)
    clean = made.tokenizer.raw_latents(batch["images"]).detach()
    torch.manual_seed(0)
    for _ in range(100):
        made._forward(batch)
    sigmas = torch.stack([(noisy - clean).flatten(1).std(1) for noisy in seen]).flatten()
    assert sigmas.max() < 0.85 and sigmas.min() < 0.05, "tau = .8"
    assert sigmas.mean() == pytest.approx(0.4, abs=0.04) and sigmas.std() == pytest.approx(0.8 / 12**0.5, abs=0.03)


RUNS = {
    "vae": {"l1", "kl", "latent_std", "gan", "gan_weight", "discriminator"},
    "va-vae": {"l1", "kl", "alignment", "alignment_weight", "gan", "discriminator"},
    "rae": {"l1", "latent_std", "gan", "gan_weight", "discriminator"},
    "maetok": {"l1", "latent_std", "hog", "dino", "gan", "gan_weight", "discriminator"},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_ends_with_a_tokenizer_that_a_generator_can_be_trained_on(kind, tmp_path, pictures):
    recipe = rival_recipe(tmp_path, pictures, kind, discriminator="dino" if kind == "rae" else "patch")
    tokenizer = train_rival(recipe)
    records = Telemetry(tmp_path, 1).records()
    assert [r["step"] for r in records] == [1, 2, 3, 4] and RUNS[kind] <= records[-1].keys()
    assert "gan" not in records[1]
    assert not (tmp_path / "checkpoints" / "rival").exists()
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.fingerprint() == tokenizer.fingerprint() and loaded.has_statistics
    recipe.generator.steps = 2
    recipe.generator.model.head_depth, recipe.generator.model.head_width = (1, 48) if kind == "rae" else (0, 2048)
    recipe.generator.model.head_heads = 2
    generator = Generator(train_generator(recipe))
    assert generator.tokenizer_fingerprint == loaded.fingerprint()
    assert generator.latent_shape == (loaded.latent_channels, *((1, 6) if kind == "maetok" else (2, 2)))
    velocity = generator.model(torch.randn(1, *generator.latent_shape), torch.tensor([0.5]), torch.tensor([0]))
    assert velocity.shape == (1, *generator.latent_shape)


def test_discriminator_may_start_before_the_generator_meets_it(tmp_path, pictures):
    recipe = rival_recipe(tmp_path, pictures, "rae")
    recipe.rival.stage.discriminator_start = 1
    train_rival(recipe)
    records = Telemetry(tmp_path, 1).records()
    assert ["discriminator" in r for r in records] == [False, True, True, True]
    assert ["gan" in r for r in records] == [False, False, True, True]


def tensors(folder) -> dict[str, torch.Tensor]:
    """Every weight of a finished run: the tokenizer's and, of REPA-E, the generator's."""
    files = sorted(folder.glob("*/model.safetensors"))
    return {f"{file.parent.name}/{k}": v for file in files for k, v in load_file(file).items()}


@pytest.mark.parametrize("kind", ["va-vae", "maetok", "repa-e"])
def test_resumed_and_watched_equals_uninterrupted(kind, tmp_path, pictures, monkeypatch):
    """Neither an interruption nor a preview changes a bit."""
    straight = rival_recipe(tmp_path / "a", pictures, kind)
    straight.rival.training.preview_every = 0
    train_rival(straight)
    original = PartLog.step

    def step_then_signal(self, done, values, images):
        original(self, done, values, images)
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    watched = rival_recipe(tmp_path / "b", pictures, kind)
    watched.rival.training.preview_every = 2
    with monkeypatch.context() as patch:
        patch.setattr(PartLog, "step", step_then_signal)
        with pytest.raises(Interrupted):
            train_rival(copy.deepcopy(watched))
    assert not (tmp_path / "b" / "tokenizer").exists()
    train_rival(watched)
    straight, resumed = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert straight.keys() == resumed.keys() and len(straight) > 40
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    early, late = (tmp_path / "b" / "previews" / f"rival-{step:08d}.png" for step in (2, 4))
    assert Image.open(early).size == Image.open(late).size and early.read_bytes() != late.read_bytes()
    assert not (tmp_path / "a" / "previews").exists()


def test_repa_e_ends_with_a_tokenizer_and_the_generator_on_it(tmp_path, pictures):
    recipe = rival_recipe(tmp_path, pictures, "repa-e")
    recipe.generator.sampler.steps = 3
    tokenizer = train_rival(recipe)
    records = Telemetry(tmp_path, 1).records()
    always = {"l1", "kl", "align_tokenizer", "align_generator", "mse", "grad_norm_generator"}
    assert [r["step"] for r in records] == [1, 2, 3, 4] and all(always <= r.keys() for r in records)
    assert ["gan" in r for r in records] == ["discriminator" in r for r in records] == [False, False, True, True]
    loaded, generator = load_tokenizer(tmp_path / "tokenizer"), Generator(tmp_path / "generator")
    assert generator.tokenizer_fingerprint == loaded.fingerprint() == tokenizer.fingerprint()
    assert generator.classes == ["disc", "square"] and generator.latent_shape == (4, 2, 2)
    assert not (tmp_path / "checkpoints" / "rival").exists()
    check_pair(generator, loaded)
    labels = torch.tensor([0, 1])
    drawn = draw(generator, loaded, labels, generator.sampler, choose_precision("cpu", "fp32"), 0)
    assert drawn.shape == (2, 3, 32, 32) and drawn.isfinite().all()
    before = (tmp_path / "generator" / "model.safetensors").read_bytes()
    assert train_rival(recipe).fingerprint() == loaded.fingerprint() and train_generator(recipe)
    assert (tmp_path / "generator" / "model.safetensors").read_bytes() == before, "finished, so it is left alone"


def test_a_finished_run_is_not_taken_for_another_rival(tmp_path, pictures):
    train_rival(rival_recipe(tmp_path, pictures, "rae"))
    before = (tmp_path / "tokenizer" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"finished aligntok\.zoo\.rae, and rival\.kind vae .*give another --output"):
        train_rival(rival_recipe(tmp_path, pictures, "vae"))
    recipe = rival_recipe(tmp_path, pictures, "rae")
    recipe.rival.rae.decoder.width = 64
    with pytest.raises(UserError, match=r"decoder\.width is 32 there, 64 was asked for.*give another --output"):
        train_rival(recipe)
    recipe = rival_recipe(tmp_path, pictures, "repa-e")
    recipe.rival.repa_e.tokenizer = "somewhere"
    with pytest.raises(UserError, match=r"rival\.kind repa-e makes aligntok\.zoo\.vae"):
        train_rival(recipe)
    assert (tmp_path / "tokenizer" / "config.json").read_bytes() == before
    assert train_rival(rival_recipe(tmp_path, pictures, "rae")).has_statistics, "the same again is read"


def stored_vae(folder, seed: int = 0) -> VAE:
    """A VAE with latent statistics, in `folder`."""
    torch.manual_seed(seed)
    vae = VAE(tiny_vae())
    vae.set_statistics(torch.randn(4), torch.rand(4) + 0.5)
    vae.save(folder)
    return vae


def test_repa_e_goes_on_with_a_stored_tokenizer(tmp_path, pictures):
    start = stored_vae(tmp_path / "vae")
    recipe = rival_recipe(tmp_path / "joint", pictures, "repa-e")
    recipe.rival.repa_e.tokenizer = str(tmp_path / "vae")
    recipe.rival.stage.steps, recipe.rival.stage.learning_rate = 1, 1e-6
    recipe.rival.repa_e.bridge_momentum = 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "for .* copying from a non-meta parameter")  # weights read into shapes alone
        found = train_rival(recipe)
    torch.testing.assert_close(found.latent_mean, start.latent_mean)
    torch.testing.assert_close(found.latent_std, (start.latent_std.square() + Bridge.eps).sqrt())
    for name, value in start.encoder.state_dict().items():
        torch.testing.assert_close(found.encoder.state_dict()[name], value, rtol=0, atol=5e-6)


def test_repa_e_does_not_go_on_with_another_generator_or_start(tmp_path, pictures, monkeypatch):
    stored_vae(tmp_path / "one", 1)
    stored_vae(tmp_path / "two", 2)

    def joint(start: str, width: int):
        recipe = rival_recipe(tmp_path / "joint", pictures, "repa-e")
        recipe.rival.repa_e.tokenizer = str(tmp_path / start)
        recipe.rival.stage.steps, recipe.rival.training.checkpoint_every = 2, 1
        recipe.generator.model.width = width
        return recipe

    def stop(self):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(RepaEObjective, "finish", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            train_rival(joint("one", 32))
    with pytest.raises(UserError, match=r"generator\.model\.width"):
        train_rival(joint("one", 64))
    with pytest.raises(UserError, match=r"repa_e\.tokenizer"):
        train_rival(joint("two", 32))


def test_a_preview_shows_the_averages(tmp_path, pictures):
    made, batch = objective("va-vae", tmp_path, pictures)
    preview = TokenizerPreview(made, open_images(str(pictures)), 32, made.precision)
    with torch.no_grad():
        for parameter in made.ema.module["decoder"].parameters():
            parameter.zero_()
        made.ema.module["decoder"].conv_out.bias.fill_(0.5)
        shown = preview._averaged()
        assert torch.equal(shown.reconstruct(shown.raw_latents(batch["images"])), torch.full((4, 3, 32, 32), 0.5))
        assert shown.encoder is made.ema.module["encoder"] and made.tokenizer.decoder is not shown.decoder
    assert Image.open(io.BytesIO(preview())).width > 8 * 32


def test_vit_encoder_trains(tmp_path, pictures):
    tokenizer = train_rival(rival_recipe(tmp_path, pictures, "va-vae", vae=tiny_vae("vit")))
    assert tokenizer.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 2, 2)


def test_element_statistics_are_those_of_the_training_images(tmp_path, pictures):
    recipe = rival_recipe(tmp_path, pictures, "rae")
    recipe.data.flip, recipe.rival.stage.steps, recipe.data.held_out = False, 1, 0.0
    tokenizer = train_rival(recipe)
    pixels, _ = load_center_crops(open_images(str(pictures)), 32)
    raw = tokenizer.raw_latents(pixels / 127.5 - 1)
    torch.testing.assert_close(tokenizer.latent_mean, raw.mean(0), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(tokenizer.latent_std, raw.std(0, unbiased=False), atol=2e-3, rtol=1e-2)


def test_refusals(tmp_path, pictures):
    recipe = rival_recipe(tmp_path, pictures, "rae")
    recipe.data.image_size = 64
    with pytest.raises(UserError, match=r"rival\.rae\.image_size is 32"):
        train_rival(recipe)
    recipe = rival_recipe(tmp_path, pictures, "vae")
    recipe.data.image_size = 40
    with pytest.raises(UserError, match="multiple of the tokenizer's downsampling 16"):
        train_rival(recipe)
    recipe = rival_recipe(tmp_path, pictures, "va-vae")
    recipe.rival.alignment.encoder.downsample = 8
    with pytest.raises(UserError, match="expected the tokenizer's 16"):
        train_rival(recipe)
    recipe = rival_recipe(tmp_path, pictures, "gan")
    with pytest.raises(UserError, match="expected vae, va-vae, rae, maetok or repa-e"):
        train_rival(recipe)
    recipe = rival_recipe(tmp_path, pictures, "maetok")
    recipe.data.image_size = 64
    with pytest.raises(UserError, match=r"rival\.maetok\.image_size is 32"):
        train_rival(recipe)
    settings = tiny_maetok_loss(dino=None, clip=tiny_vit(downsample=8))
    with pytest.raises(UserError, match=r"rival\.maetok_loss\.clip\.downsample is 8, expected the tokenizer's 16"):
        train_rival(rival_recipe(tmp_path, pictures, "maetok", maetok_loss=settings))


def test_refusals_of_repa_e(tmp_path, pictures):
    recipe = rival_recipe(tmp_path, pictures, "repa-e")
    recipe.rival.stage.ema_decay = 0.9
    with pytest.raises(UserError, match=r"rival\.stage\.ema_decay is given.*set it to null"):
        train_rival(recipe)
    recipe = rival_recipe(tmp_path, pictures, "repa-e")
    recipe.generator.model.classes = 1
    with pytest.raises(UserError, match=r"2 classes, but generator\.model\.classes is 1"):
        train_rival(recipe)
    recipe = rival_recipe(tmp_path, pictures, "repa-e")
    recipe.rival.repa_e.depth = 8
    with pytest.raises(UserError, match=r"rival\.repa_e\.depth is 8, the generator has 1 blocks"):
        train_rival(recipe)
    recipe.rival.repa_e.tokenizer = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no tokenizer at"):
        train_rival(recipe)
    assert not (tmp_path / "tokenizer").exists() and not (tmp_path / "generator").exists()


@pytest.mark.parametrize(
    ("name", "kind", "channels", "parameters"),  # of the tokenizer's latents, of the generator [M]
    [
        ("vae", "vae", 32, 675.257),
        ("va_vae", "va-vae", 32, 675.257),
        ("va_vae_vit", "va-vae", 32, 675.257),
        ("flux", "vae", 64, 675.330),
        ("rae", "rae", 768, 838.676),
        ("maetok", "maetok", 32, 675.109),  # 128 positions, not 256
        ("repa_e", "repa-e", 32, 675.257),
    ],
)
def test_shipped_recipes(name, kind, channels, parameters):
    recipe = parse_recipe("train-rival", ["--config", f"imagenet256_{name}"])
    assert recipe.rival.kind == kind
    with torch.device("meta"):
        tokenizer = build_rival(recipe.rival)
        assert (tokenizer.latent_channels, tokenizer.downsample) == (channels, 16)
        size = tokenizer.grid(torch.empty(1, 3, 256, 256))
        assert size == ((1, 128) if kind == "maetok" else (16, 16))
        model = generator_class(recipe.generator.model)(recipe.generator.model, tokenizer.latent_channels, size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.01)
    if name == "flux":
        assert recipe.rival.vae == flux_config()


def test_recipes_have_the_peers_clamps_times_and_guidance():
    for name in ("vae", "va_vae", "va_vae_vit", "flux"):
        recipe = parse_recipe("train-rival", ["--config", f"imagenet256_{name}"])
        assert recipe.rival.losses.gan_weight_max == pytest.approx(1e4 / (3 * 256 * 256), rel=1e-3), name
    recipe = parse_recipe("train-rival", ["--config", "imagenet256_va_vae"])
    assert recipe.rival.alignment.weight_max == pytest.approx(1e8 / (3 * 256 * 256), rel=1e-3)
    generator = parse_recipe("train-rival", ["--config", "imagenet256_rae"]).generator
    assert generator.sampler.guidance_interval == (0.0, 1.0) and generator.flow.time_sampling == "logit_normal"
