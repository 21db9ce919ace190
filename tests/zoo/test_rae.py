"""RAE as a tokenizer: sizes, parity with diffusers' AutoencoderRAE, element-wise statistics; its discriminator."""

import pytest
import torch
from zoo_rivals import tiny_dino, tiny_rae

from aligntok.config import DinoDiscriminatorConfig, EncoderConfig, RAEConfig, ViTDecoderConfig
from aligntok.errors import UserError
from aligntok.models.tokenizer import load_tokenizer
from aligntok.zoo.converters.rae import sources
from aligntok.zoo.dino_discriminator import DinoDiscriminator, augment
from aligntok.zoo.rae import RAE, ViTDecoder


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(("size", "expected"), [("B", 86.238), ("L", 303.887), ("XL", 415.057)])
def test_published_decoders(size, expected):
    """RAE names XL "about 415 M"; B and L follow from their configurations."""
    with torch.device("meta"):
        decoder = ViTDecoder(768, (16, 16), ViTDecoderConfig(size=size))
        assert millions(decoder) == pytest.approx(expected, abs=1e-3)
        assert decoder(torch.empty(1, 256, 768)).shape == (1, 256, 768)


def test_published_tokenizer():
    with torch.device("meta"):
        rae = RAE(RAEConfig())
        assert rae.raw_latents(torch.empty(1, 3, 256, 256)).shape == (1, 768, 16, 16)
    assert millions(rae.encoder) == pytest.approx(86.5805, abs=1e-3), "DINOv2-B with registers, no affine final norm"
    assert not list(rae.encoder.backbone.norm.parameters()) and rae.latent_mean.shape == (768, 16, 16)


def made(size: int = 32) -> RAE:
    torch.manual_seed(0)
    rae = RAE(tiny_rae(size)).eval()
    rae.set_statistics(torch.randn(rae.latent_mean.shape), torch.rand(rae.latent_std.shape) + 0.5)
    return rae


@torch.no_grad()
def test_tokens_are_layer_normalised_without_scale():
    raw = made().raw_latents(torch.rand(2, 3, 32, 32) * 2 - 1)
    torch.testing.assert_close(raw.mean(1), torch.zeros(2, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(raw.var(1, unbiased=False), torch.ones(2, 2, 2), atol=1e-3, rtol=0)


@torch.no_grad()
def test_folder_gives_the_same_bits_back(tmp_path):
    rae, images = made(), torch.rand(2, 3, 32, 32) * 2 - 1
    rae.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    latents = rae.encode(images)
    assert latents.shape == (2, 192, 2, 2) and rae.decode(latents).shape == images.shape
    assert torch.equal(loaded.encode(images), latents) and torch.equal(loaded.decode(latents), rae.decode(latents))
    expected = (rae.raw_latents(images) - rae.latent_mean) / rae.latent_std
    assert torch.equal(latents, expected), "statistics are those of the element, not of the channel"
    assert loaded.fingerprint() == rae.fingerprint()


def test_refusals():
    with pytest.raises(UserError, match="made for 32 x 32 px"):
        made().raw_latents(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match=r"latents of \[4, 4\]"):
        made().reconstruct(torch.zeros(1, 192, 4, 4))
    std = torch.ones(192, 2, 2)
    std[5, 1, 0] = 0
    with pytest.raises(UserError, match=r"channels \[5\]"):
        made().set_statistics(torch.zeros_like(std), std)
    for config, message in (
        (ViTDecoderConfig(size="B", depth=3), "use size custom"),
        (ViTDecoderConfig(size="custom", depth=3), "give depth, width, heads and hidden"),
        (ViTDecoderConfig(size="custom", depth=1, width=36, heads=5, hidden=64), "multiple of 4"),
    ):
        with pytest.raises(UserError, match=message):
            ViTDecoder(8, (2, 2), config)
    config = tiny_rae()
    config.decoder.patch_size = 8
    with pytest.raises(UserError, match="must be equal"):
        RAE(config)


def hugging_face_to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Dinov2WithRegisters' tensors under timm's names."""
    found = {
        "cls_token": state["embeddings.cls_token"],
        "reg_token": state["embeddings.register_tokens"],
        # timm gives only patches a position: the class token's is added to it
        "pos_embed": state["embeddings.position_embeddings"][:, 1:],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    found["cls_token"] = found["cls_token"] + state["embeddings.position_embeddings"][:, :1]
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    for i in range(layers):
        a, b = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{a}attention.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{b}attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{b}attn.proj.{kind}"] = state[f"{a}attention.o_proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{b}{name}.{kind}"] = state[f"{a}{name}.{kind}"]
        for number in (1, 2):
            found[f"{b}ls{number}.gamma"] = state[f"{a}layer_scale{number}.lambda1"]
    return found


@torch.no_grad()
def test_parity_with_diffusers():
    """Same tensors, same latents, same pictures as diffusers' AutoencoderRAE, at two blocks each.

    At 256 px, the one size where diffusers' position table, which it stretches to 16 x 16, is that of RAE's code.
    """
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    peer = AutoencoderRAE(
        encoder_hidden_size=384,
        encoder_num_hidden_layers=2,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=160,
        latents_mean=torch.randn(384, 16, 16),
        latents_std=torch.rand(384, 16, 16) + 0.5,
    ).eval()
    for parameter in peer.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    decoder = ViTDecoderConfig(size="custom", depth=2, width=64, heads=4, hidden=160)
    encoder = EncoderConfig("vit_small_patch14_reg4_dinov2.lvd142m", "random", layer=1, antialias=False)
    rae = RAE(RAEConfig(encoder=encoder, decoder=decoder)).eval()
    rae.encoder.backbone.load_state_dict(hugging_face_to_timm(peer.encoder.state_dict()))
    theirs, ours = peer.decoder.state_dict(), {}
    names = {"attention.attention.query": "attention.to_q", "attention.attention.key": "attention.to_k"}
    names |= {"attention.attention.value": "attention.to_v", "attention.output.dense": "attention.to_out.0"}
    for own in rae.decoder.state_dict():
        parts = sources(own)
        for published, renamed in names.items():
            parts = [part.replace(published, renamed) for part in parts]
        ours[own] = torch.cat([theirs[part] for part in parts])
    rae.decoder.load_state_dict(ours)
    rae.set_statistics(peer._latents_mean, peer._latents_std + 1e-5)
    images = torch.rand(1, 3, 256, 256)
    latents = peer.encode(images).latent
    torch.testing.assert_close(rae.encode(images * 2 - 1), latents, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(rae.decode(latents), peer.decode(latents).sample * 2 - 1, atol=1e-4, rtol=1e-4)


def test_discriminator():
    with torch.device("meta"):
        published = DinoDiscriminator(DinoDiscriminatorConfig())
        assert published.eval()(torch.empty(2, 3, 256, 256)).shape == (2, 5 * 28 * 28)
    # five heads of 384 x 384 x (1 + 9) + 384, with biases and the scale and shift of two norms
    assert millions(published) == pytest.approx(5 * (384 * 384 * 10 + 384 * 7 + 1) / 1e6)
    torch.manual_seed(0)
    small = DinoDiscriminator(tiny_dino())
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    logits = small(images)
    assert logits.shape == (2, 3 * 4)
    logits.sum().backward()
    assert images.grad.abs().max() > 0
    assert all(p.grad is not None for p in small.parameters())
    assert not any(p.requires_grad for p in small._frozen[0].parameters())
    assert not any("frozen" in name for name in small.state_dict())


def test_discriminator_features_are_those_of_the_blocks():
    small = DinoDiscriminator(tiny_dino()).eval()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    last, first, second = small.features(images)
    encoder = small._frozen[0]
    torch.testing.assert_close(second.transpose(1, 2), encoder(images))
    assert torch.equal(last, second) and not torch.equal(first, second)


def test_augmentation_moves_and_colours_but_keeps_gradients():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 16, 16).requires_grad_()
    changed = augment(images)
    assert changed.shape == images.shape
    shifts = (changed - images).flatten(1).abs().amax(1)
    assert (shifts > 0).all()
    changed.sum().backward()
    assert images.grad.abs().max() > 0
    assert (changed[:, :, 0] == 0).all(1).any(), "some image was moved down, and black came in"


def test_impossible_discriminators_are_refused():
    config = tiny_dino()
    config.taps = (0, 7)
    with pytest.raises(UserError, match="blocks from 0 to 1"):
        DinoDiscriminator(config)
    config = tiny_dino()
    config.kernel = 4
    with pytest.raises(UserError, match="odd number"):
        DinoDiscriminator(config)
