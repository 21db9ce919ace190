"""Text encoders: features are those of the model called on one caption alone, whatever stands beside it in a batch."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_encoders import LAYERS, WIDTH, write_encoder

from aligntok.config import TextEncoderConfig
from aligntok.errors import UserError
from aligntok.models.text_encoder import TextEncoder
from aligntok.runtime.devices import Precision, choose_precision

KINDS = ("bert", "qwen3", "t5", "gemma2")
CAPTIONS = ["a red cat on the mat", "", "the sky", "a blue dog under the blue sky on the mat"]
OWN = {"bert": 2, "qwen3": 0, "t5": 1, "gemma2": 1}  # tokens that a tokenizer adds to every caption
FP32 = choose_precision("cpu", "fp32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("encoders")
    return {kind: write_encoder(made / kind, kind) for kind in KINDS}


def opened(folder: Path, precision: Precision = FP32, **fields) -> TextEncoder:
    return TextEncoder(TextEncoderConfig(name=str(folder), **({"tokens": 16} | fields)), precision)


def alone(kind: str, folder: Path, ids: list[int], layer: int) -> torch.Tensor:
    """Hidden states of transformers' own class on the ids of one caption."""
    import transformers as hf

    cls = {"bert": hf.BertModel, "qwen3": hf.Qwen3Model, "t5": hf.T5EncoderModel, "gemma2": hf.Gemma2Model}[kind]
    model = cls.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_model_itself(folders, kind, layer):
    encoder = opened(folders[kind], layer=layer)
    features, lengths = encoder.encode(CAPTIONS)
    assert features.shape == (4, 16, WIDTH) and features.dtype == torch.float32 and encoder.width == WIDTH
    assert lengths.tolist() == [max(1, len(caption.split()) + OWN[kind]) for caption in CAPTIONS]
    for ids, row, length in zip(encoder.tokenize(CAPTIONS).ids, features, lengths, strict=True):
        torch.testing.assert_close(row[:length], alone(kind, folders[kind], ids, layer), rtol=0, atol=1e-5)
        assert not row[length:].any() and row[:length].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_has_its_features_whatever_its_neighbours(folders, kind):
    encoder = opened(folders[kind])
    together, _ = encoder.encode(CAPTIONS)
    for caption, row in zip(CAPTIONS, together, strict=True):
        torch.testing.assert_close(encoder.encode([caption])[0][0], row, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_long_captions_are_cut_and_counted(folders, kind):
    encoder = opened(folders[kind], tokens=5)
    features, lengths = encoder.encode(CAPTIONS)
    assert features.shape == (4, 5, WIDTH) and lengths.tolist()[0] == 5 and encoder.cut == 2
    tokens = encoder.tokenize(CAPTIONS)
    assert tokens.cut == [True, False, False, True] and encoder.cut == 2
    ends = {"bert": [1, 2], "qwen3": [4, 10], "t5": [4, 2], "gemma2": [1, 9]}[kind]  # special tokens are kept
    assert [tokens.ids[0][0], tokens.ids[0][-1]] == ends
    assert encoder.encode([])[0].shape == (0, 5, WIDTH)


def test_nothing_becomes_one_token_where_the_tokenizer_gives_none(folders):
    assert opened(folders["qwen3"]).tokenize([""]).ids == [[2]]  # EOS: it has no BOS
    assert opened(folders["gemma2"]).tokenize([""]).ids == [[1]]


def test_bf16_is_taken_where_the_run_has_it(folders):
    exact, rounded = (opened(folders["t5"], Precision(torch.device("cpu"), name)) for name in ("fp32", "bf16"))
    features = rounded.encode(CAPTIONS)[0]
    assert features.dtype == torch.float32 and torch.equal(features, features.bfloat16().float())
    torch.testing.assert_close(features, exact.encode(CAPTIONS)[0], rtol=0.05, atol=0.05)
    assert rounded.fingerprint() == exact.fingerprint()


def test_the_fingerprint_is_of_what_decides_features(folders, tmp_path):
    first = opened(folders["bert"])
    others = [opened(folders["bert"], layer=0), opened(folders["bert"], tokens=8)]
    others += [opened(write_encoder(tmp_path / "other", "bert", seed=1)), opened(folders["gemma2"])]
    assert len({encoder.fingerprint() for encoder in [first, *others]}) == 5
    moved = write_encoder(tmp_path / "again", "bert")
    assert opened(moved).fingerprint() == first.fingerprint() == opened(moved, layer=LAYERS).fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": -4}, r"text\.encoder\.layer is -4, but .* has 2 layers: expected -1 \(the last\) to -3, or 0"),
        ({"layer": 3}, "text.encoder.layer is 3"),
        ({"tokens": 2}, "text.encoder.tokens is 2, expected at least 3 and at most 64"),
        ({"tokens": 65}, "text.encoder.tokens is 65"),
    ],
)
def test_layers_and_tokens_that_do_not_exist_are_refused(folders, change, message):
    with pytest.raises(UserError, match=message):
        opened(folders["bert"], **change)


def without_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.0.output.dense.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def with_pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, r"lacks 1 tensors of .*output\.dense\.weight"),
        (with_pickled_weights, "has no model.safetensors .* weights of other formats are not read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "its weights cannot be read"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "its config.json cannot be read"),
        (
            lambda f: (
                (f / "model.safetensors").rename(f / "x")
                and (f / "model.safetensors.index.json").write_text(
                    json.dumps({"weight_map": {"a": "gone.safetensors"}})
                )
            ),
            "lacks 1 files that model.safetensors.index.json names",
        ),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, message):
    damage(write_encoder(tmp_path, "bert"))
    with pytest.raises(UserError, match=message) as raised:
        opened(tmp_path)
    assert "\n" not in str(raised.value)


def test_sharded_weights_are_read(tmp_path):
    whole = opened(write_encoder(tmp_path, "bert")).encode(CAPTIONS)[0]
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert torch.equal(opened(tmp_path).encode(CAPTIONS)[0], whole)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing-of-this-name"])
def test_an_unknown_name_or_no_network_is_one_line(monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def unreachable(*args, **options):
        raise ConnectionError("no route to the hub. And much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=f"{name} cannot be fetched from the hub .*no route.* use minilm-l6"):
        TextEncoder(TextEncoderConfig(name=name), FP32)


@pytest.mark.parametrize("name", ["/no/folder", "./no", "a/b/c", ""])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match="there is no such folder"):
        TextEncoder(TextEncoderConfig(name=name), FP32)


def test_without_transformers_there_is_the_reason(monkeypatch):
    real = builtins.__import__

    def refusing(name, *rest, **named):
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(UserError, match=r"needs transformers, .*No module named.* pip install 'aligntok\[t2i\]'"):
        TextEncoder(TextEncoderConfig(name="minilm-l6"), FP32)


def test_minilm_knows_what_words_mean():
    """Whole sentences: the mean over tokens, as the model was trained."""
    encoder = TextEncoder(TextEncoderConfig(name="minilm-l6", tokens=16), FP32)
    features, lengths = encoder.encode(["a photo of a cat", "a picture of a kitten", "the stock market fell", ""])
    means = torch.nn.functional.normalize(features.sum(1) / lengths[:, None], dim=-1)
    assert encoder.width == 384 and lengths.tolist()[-1] == 2
    assert means[0] @ means[1] > 0.75 > 0.2 > abs(means[0] @ means[2])
