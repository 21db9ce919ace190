"""Parameter counts against the published ones, on the meta device: a wrong layer shows here before anything runs."""

import pytest
import torch

from aligntok.config import (
    AdapterConfig,
    DecoderConfig,
    DiscriminatorConfig,
    EncoderConfig,
    LightningDiTConfig,
    TokenizerConfig,
)
from aligntok.errors import UserError
from aligntok.models.decoder import Decoder
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import AlignTok


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DecoderConfig(), 41.4176),  # LDM decoder at f16d32, without VA-VAE's 1x1 convolution of 1,056
        (
            DecoderConfig(base_channels=288, channel_multipliers=(1, 2, 4, 4, 4)),
            350.2420,
        ),  # the large ablation
    ],
)
def test_decoder(config, expected):
    with torch.device("meta"):
        decoder = Decoder(32, config)
        assert millions(decoder) == pytest.approx(expected, abs=1e-4)
        assert decoder(torch.empty(1, 32, 16, 16)).shape == (1, 3, 256, 256)


def test_discriminator():
    with torch.device("meta"):
        discriminator = PatchDiscriminator(DiscriminatorConfig())
        assert millions(discriminator) == pytest.approx(2.7656, abs=1e-4)
        assert discriminator(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)


@pytest.mark.parametrize(("size", "expected"), [("S", 32.985), ("B", 130.556), ("L", 458.153), ("XL", 675.257)])
def test_lightning_dit(size, expected):
    with torch.device("meta"):
        model = LightningDiT(LightningDiTConfig(size=size, classes=1000), 32, (16, 16))
    assert millions(model) == pytest.approx(expected, abs=1e-3)


def test_lightning_dit_without_shift_has_four_modulations():
    with torch.device("meta"):
        full = LightningDiT(LightningDiTConfig(size="S", classes=10), 32, (16, 16))
        reduced = LightningDiT(LightningDiTConfig(size="S", classes=10, shift=False), 32, (16, 16))
    assert millions(full) - millions(reduced) == pytest.approx(12 * 2 * (384 * 384 + 384) / 1e6)


def test_whole_tokenizer_at_the_paper_size():
    with torch.device("meta"):
        tokenizer = AlignTok(TokenizerConfig())
    parts = (millions(tokenizer.encoder), millions(tokenizer.adapter), millions(tokenizer.decoder))
    assert parts == pytest.approx((304.37, 1.0824, 41.4176), abs=5e-3)


def test_linear_adapter_is_one_layer():
    with torch.device("meta"):
        tokenizer = AlignTok(TokenizerConfig(adapter=AdapterConfig(kind="linear", latent_channels=64)))
    assert millions(tokenizer.adapter) == pytest.approx((1024 * 64 + 64) / 1e6)
    assert tokenizer.latent_channels == 64


def test_levels_that_do_not_match_the_downsampling_are_refused():
    with torch.device("meta"), pytest.raises(UserError, match="enlarges 8x"):
        AlignTok(TokenizerConfig(encoder=EncoderConfig(), decoder=DecoderConfig(channel_multipliers=(1, 2, 2, 4))))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"decoder\.groups = 32"):
        Decoder(4, DecoderConfig(base_channels=48))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LightningDiTConfig(size="custom", depth=2, width=64), "give depth, width and heads"),
        (LightningDiTConfig(size="custom", depth=2, width=60, heads=10), "multiple of 4"),
        (LightningDiTConfig(size="B", depth=2), "use size custom"),
    ],
)
def test_impossible_transformers_are_refused(config, message):
    config.classes = 3
    with pytest.raises(UserError, match=message):
        LightningDiT(config, 4, (2, 2))
