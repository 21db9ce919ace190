"""Models and pipelines for diffusers: what they compute is what the project computes, and folders go there and back."""

import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer
from text_encoders import write_encoder
from torch import nn

from aligntok.cli import main
from aligntok.config import FluxTransformerConfig, LightningDiTConfig, SamplerConfig, TextEncoderConfig
from aligntok.diffusers import AlignTokPipeline, AlignTokTextToImagePipeline, AutoencoderAlignTok
from aligntok.diffusers.tiles import in_tiles
from aligntok.evaluation.asked import Captions
from aligntok.evaluation.generation import draw
from aligntok.models.generator import Generator, TextSource, build_network, save_generator
from aligntok.models.text_encoder import TextEncoder
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import Precision
from aligntok.zoo.vae import VAE

CPU = Precision(torch.device("cpu"), "fp32")
GRID = (2, 3)
SAMPLER = SamplerConfig(steps=5, guidance=2.5, time_shift=2.0, guidance_interval=(0.0, 0.9), guidance_channels=3)
CLASSES = ["fox", "owl", "newt"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    made = tiny_tokenizer()
    made.set_statistics(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8))
    made.save(folder := tmp_path_factory.mktemp("folders") / "tokenizer")
    return folder


def _generator(folder: Path, tokenizer: Path, sampler=SAMPLER, encoder: TextEncoder | None = None) -> Path:
    """A generator with random weights, of classes or of captions."""
    config = LightningDiTConfig(size="custom", depth=2, width=32, heads=2, classes=len(CLASSES))
    if encoder is not None:
        config = FluxTransformerConfig(width=32, heads=2, double_blocks=1, single_blocks=1, pad_to=2)
    torch.manual_seed(1)
    network = build_network(config, 8, GRID, None if encoder is None else encoder.width)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    text = None if encoder is None else TextSource(encoder.config, encoder.fingerprint())
    fingerprint = load_tokenizer(tokenizer).fingerprint()
    names = CLASSES if encoder is None else []
    save_generator(folder, network, network.state_dict(), sampler, names, fingerprint, text)
    return folder


@pytest.fixture(scope="module")
def of_classes(tokenizer) -> Path:
    return _generator(tokenizer.parent / "generator", tokenizer)


@pytest.fixture(scope="module")
def of_captions(tokenizer) -> Path:
    files = write_encoder(tokenizer.parent / "encoder", "bert")
    encoder = TextEncoder(TextEncoderConfig(str(files), width=32, tokens=8), CPU)
    return _generator(tokenizer.parent / "of_captions", tokenizer, encoder=encoder)


def _export(output: Path, tokenizer: Path, *more: str) -> Path:
    arguments = ["export", "--to", "diffusers", "--tokenizer", str(tokenizer), "--output", str(output)]
    assert main([*arguments, *more]) == 0
    return output


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _drawn(generator: Path, tokenizer: Path, asked) -> torch.Tensor:
    known = Generator(generator)
    images = draw(known, load_tokenizer(tokenizer), asked, known.sampler, CPU, seed=3)
    return (images / 2 + 0.5).clamp(0, 1)


def test_the_autoencoder_is_the_tokenizer(tokenizer, tmp_path, capsys):
    vae = AutoencoderAlignTok.from_pretrained(_export(tmp_path / "vae", tokenizer))
    assert "AutoencoderAlignTok.from_pretrained" in capsys.readouterr().out
    known, images = load_tokenizer(tokenizer), torch.rand(3, 3, 32, 48) * 2 - 1
    latent = vae.encode(images).latent
    assert torch.equal(latent, known.encode(images)) and vae.config.scaling_factor == 1
    assert torch.equal(vae.decode(latent).sample, known.decode(latent))
    vae.enable_slicing()
    torch.testing.assert_close(vae.decode(latent).sample, known.decode(latent))
    vae.disable_slicing()
    with pytest.raises(ValueError, match="multiple of the tokenizer's downsampling 16"):
        vae.encode(images[..., :33])
    with pytest.warns(UserWarning, match="padded to 32x48"):
        assert vae(images[..., 2:31, :40]).sample.shape == (3, 3, 29, 40)


def test_large_pictures_go_in_tiles_without_seams(tokenizer, tmp_path):
    vae = AutoencoderAlignTok.from_pretrained(_export(tmp_path / "vae", tokenizer), tile_size=4, tile_overlap=2)
    latents = torch.randn(1, 8, 7, 5)
    whole = vae.decode(latents).sample
    vae.enable_tiling()
    tiled = vae.decode(latents).sample
    assert tiled.shape == whole.shape == (1, 3, 112, 80) and not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.5 * whole.std()
    assert vae.encode(whole).latent.shape == (1, 8, 7, 5)
    # where a function knows no neighbours, tiles are the whole
    for cells in ((9, 4), (3, 11), (4, 4)):
        x = torch.randn(2, 3, 2 * cells[0], 2 * cells[1])
        doubled = in_tiles(lambda part: part.repeat_interleave(2, -1).repeat_interleave(2, -2), x, cells, 4, 3)
        torch.testing.assert_close(doubled, x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_classes_are_drawn_as_by_sample(tokenizer, of_classes, tmp_path):
    pipeline = AlignTokPipeline.from_pretrained(
        _export(tmp_path / "pipe", tokenizer, "--generator", str(of_classes), "--shard_size", "100KB")
    )
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 1
    noise = torch.Generator().manual_seed(3)
    images = _quiet(pipeline)(["owl", 2, "fox"], generator=noise, output_type="pt").images
    wanted = _drawn(of_classes, tokenizer, torch.tensor([1, 2, 0]))
    assert wanted.std() > 0.05
    torch.testing.assert_close(images, wanted, atol=1e-5, rtol=0)
    plain = pipeline("owl", guidance_scale=1.0, num_inference_steps=2, height=16, width=64, output_type="np").images
    assert plain.shape == (1, 16, 64, 3)
    latents = torch.randn(1, 8, *GRID)
    pair = [pipeline(0, latents=latents, output_type=kind).images for kind in ("latent", "pil")]
    assert pair[0].shape == latents.shape and pair[1][0].size == (48, 32)
    for label, message in (("yak", "no class 'yak': expected one of fox, owl, newt"), (9, "label 9 is out of range")):
        with pytest.raises(ValueError, match=message):
            pipeline(label)
    with pytest.raises(ValueError, match=r"sampler\.steps is 0"):
        pipeline(0, num_inference_steps=0)
    with pytest.raises(ValueError, match="height or width is 20"):
        pipeline(0, height=20)


def test_prompts_are_drawn_as_by_sample(tokenizer, of_captions, tmp_path):
    pipeline = AlignTokTextToImagePipeline.from_pretrained(
        _export(tmp_path / "pipe", tokenizer, "--generator", str(of_captions))
    )
    known = Generator(of_captions)
    prompts = ["a red cat", "the blue dog on the mat"]
    asked = Captions(TextEncoder(known.text.encoder, CPU), [p for p in prompts for _ in range(2)], "under the sky")
    images = _quiet(pipeline)(
        prompts,
        negative_prompt="under the sky",
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    wanted = _drawn(of_captions, tokenizer, asked)
    assert wanted.std() > 0.05
    torch.testing.assert_close(images, wanted, atol=5e-5, rtol=0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        pipeline(["a cat", " "])


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_are_variants_and_keep_the_statistics(name, dtype, tokenizer, of_classes, tmp_path):
    folder = _export(tmp_path / "pipe", tokenizer, "--generator", str(of_classes), "--dtype", name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument has another name in newer releases
        pipeline = _quiet(AlignTokPipeline.from_pretrained(folder, variant=name, torch_dtype=dtype))
    known, z = load_tokenizer(tokenizer), torch.randn(2, 8, *GRID)
    assert torch.equal(pipeline.vae.tokenizer.latent_std, known.latent_std)
    network, labels = Generator(of_classes).model.to(dtype), torch.tensor([0, 3])
    velocity = pipeline.transformer(z, 500.0, labels).sample
    assert velocity.dtype == dtype and torch.equal(velocity, network(z, torch.full((2,), 0.5), labels))
    assert torch.equal(pipeline.vae.decode(z).sample, known.to(dtype).decode(z))


@pytest.mark.parametrize("kind", ["of_classes", "of_captions"])
def test_there_and_back_without_loss(kind, tokenizer, tmp_path, request):
    generator = request.getfixturevalue(kind)
    _export(tmp_path / "there", tokenizer, "--generator", str(generator))
    back = ["convert", "--from", "diffusers-aligntok", str(tmp_path / "there"), "--output", str(tmp_path / "back")]
    assert main(back) == 0
    for own, name in ((tokenizer, "tokenizer"), (generator, "generator")):
        for file in ("config.json", "model.safetensors"):
            assert (own / file).read_bytes() == (tmp_path / "back" / name / file).read_bytes(), (name, file)


def test_a_rival_alone_there_and_back(tmp_path):
    model = VAE(VAE.config_class())
    model.set_statistics(torch.zeros(model.latent_channels), torch.ones(model.latent_channels))
    model.save(tmp_path / "own")
    there = _export(tmp_path / "there", tmp_path / "own")
    vae = AutoencoderAlignTok.from_pretrained(there)
    assert vae.config.tokenizer_format == "aligntok.zoo.vae" and asdict(vae.tokenizer.config) == asdict(model.config)
    assert main(["convert", "--from", "diffusers-aligntok", str(there), "--output", str(tmp_path / "back")]) == 0
    assert (tmp_path / "own/model.safetensors").read_bytes() == (tmp_path / "back/model.safetensors").read_bytes()


def test_what_does_not_fit_ends_with_one_line(tokenizer, of_classes, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    export = ("export", "--to", "diffusers", "--output", str(tmp_path / "out"), "--tokenizer")
    heun = _generator(tmp_path / "heun", tokenizer, SamplerConfig(solver="heun", steps=4))
    told = refused(*export, str(tokenizer), "--generator", str(heun))
    assert "sampler.solver=heun" in told and "cannot be exported" in told
    other = tiny_tokenizer(seed=5)
    other.set_statistics(torch.zeros(8), torch.ones(8))
    other.save(tmp_path / "other")
    assert "latents of another tokenizer" in refused(*export, str(tmp_path / "other"), "--generator", str(of_classes))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(*export, str(tokenizer), "--generator", str(of_classes))
    assert "notes.txt" in refused(*export, str(tokenizer))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]

    back = ("convert", "--output", str(tmp_path / "back"), "--from", "diffusers-aligntok")
    assert "model_index.json" not in refused(*back, str(tmp_path / "nowhere"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "is of AutoencoderKL, expected one of AlignTokPipeline" in refused(*back, str(tmp_path / "foreign"))
    (tmp_path / "foreign" / "config.json").write_text('{"_class_name": "AutoencoderAlignTok"}')
    assert "cannot be read by diffusers" in refused(*back, str(tmp_path / "foreign"))


def test_without_diffusers_the_reason_is_one_line(tokenizer, tmp_path):
    program = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from aligntok.cli import main\n"
        f"sys.exit(main(['export', '--to', 'diffusers', '--tokenizer', {str(tokenizer)!r}, '--output', 'out']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "aligntok.diffusers needs diffusers" in done.stderr and "aligntok[diffusers]" in done.stderr
