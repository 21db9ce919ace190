"""Scores of pictures and prompts: every formula on small random networks, computed a second time independently."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from prompted_folders import write_sampled
from text_scorer_weights import (
    SIDE,
    TINY_HPS,
    add_tiny_hps,
    reward_state,
    write_bert_tokenizer,
    write_clip,
    write_hps,
)
from torch import Tensor
from torchvision.transforms import functional as T

from aligntok.errors import UserError
from aligntok.evaluation import scorer_weights
from aligntok.evaluation.hps import CLIP_MEAN, CLIP_STD, HumanPreferenceScore, refuse_one_for_both
from aligntok.evaluation.hps import shown as shown_to_hps
from aligntok.evaluation.image_reward import ImageReward
from aligntok.evaluation.image_reward import shown as shown_to_reward
from aligntok.evaluation.prompted import open_prompted
from aligntok.evaluation.scorer_weights import place_of
from aligntok.evaluation.text_scores import ClipScore, PickScore, measure_scores

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "a dog on the hill", "the hill"]
LONG = "a red fox on the hill a dog on the hill"


def picture(number: int, width: int = 48, height: int = 40) -> Image.Image:
    values = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(number))
    grown = F.interpolate(values[None], (height, width), mode="bilinear")[0]
    return T.to_pil_image(grown)


PICTURES = [picture(number) for number in range(3)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    add_tiny_hps(folder / "configs")
    return write_hps(folder / "HPS_v2_compressed.pt"), write_hps(folder / "HPS_v2.1_compressed.pt", seed=1)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    torch.save(reward_state(), folder / "ImageReward.pt")
    return folder / "ImageReward.pt", write_bert_tokenizer(folder / "bert")


def clip_cosines(folder, pictures, prompts) -> tuple[Tensor, float]:
    """From the model's own forward pass, one pair at a time, on torchvision's preprocessing."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    cosines = []
    for image, prompt in zip(pictures, prompts, strict=True):
        image = T.center_crop(T.resize(image, SIDE, T.InterpolationMode.BICUBIC), [SIDE, SIDE])
        values = T.normalize(T.to_tensor(image), CLIP_MEAN, CLIP_STD)[None]
        with torch.no_grad():
            found = model(pixel_values=values, **tokenizer([prompt], return_tensors="pt"))
        cosines.append(float(F.normalize(found.image_embeds) @ F.normalize(found.text_embeds).T))
    return torch.tensor(cosines).double(), float(model.logit_scale.detach().exp())


def test_clip_score_is_a_hundred_cosines(clip):
    scorer = ClipScore(str(clip), CPU)
    expected, _ = clip_cosines(clip, PICTURES, PROMPTS)
    torch.testing.assert_close(scorer(PICTURES, PROMPTS)[:, 0], 100 * expected, atol=0.2, rtol=0)  # 8-bit resize
    assert scorer.names == ("CLIP score x100",) and scorer.cut == 0
    assert expected.std() > 0.02  # networks that tell pictures apart
    for part in ("tiny, sha256", "100 cos", "shortest side to 32 px (bicubic), centre crop 32 px", "8 text tokens"):
        assert part in scorer.protocol


def test_clip_score_is_that_of_torchmetrics(clip):
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    class Older(CLIPModel):  # torchmetrics 1.9 expects tensors of these, as transformers 4 gave
        def get_image_features(self, *arguments, **named):
            found = super().get_image_features(*arguments, **named)
            return getattr(found, "pooler_output", found)

        def get_text_features(self, *arguments, **named):
            found = super().get_text_features(*arguments, **named)
            return getattr(found, "pooler_output", found)

    theirs = CLIPScore(lambda: (Older.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)))
    theirs.update([T.pil_to_tensor(image) for image in PICTURES], PROMPTS)
    ours = ClipScore(str(clip), CPU)(PICTURES, PROMPTS).mean()
    assert max(float(ours), 0) == pytest.approx(float(theirs.compute()), abs=1e-3)


def test_pickscore_scales_the_same_cosines(clip):
    scorer = PickScore(str(clip), None, CPU)
    expected, scale = clip_cosines(clip, PICTURES, PROMPTS)
    found = scorer(PICTURES, PROMPTS)
    torch.testing.assert_close(found[:, 1], expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(found[:, 0], scale * found[:, 1])
    assert scale == pytest.approx(3.4903, abs=1e-3) and "exp(logit_scale) = 3.49" in scorer.protocol


def test_pickscore_may_have_its_processor_elsewhere(clip, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((clip / name).read_bytes())
    found = PickScore(str(bare), str(clip), CPU)(PICTURES, PROMPTS)
    torch.testing.assert_close(found, PickScore(str(clip), None, CPU)(PICTURES, PROMPTS))
    with pytest.raises(UserError, match=r"--pickscore: .*bare holds no such model"):
        PickScore(str(bare), None, CPU)


def test_long_prompts_are_cut_and_counted(clip, hps, reward):
    short = " ".join(LONG.split()[:6])  # with start and end token 8
    scorer = ClipScore(str(clip), CPU)
    cut = scorer(PICTURES[:1], [LONG])
    assert scorer.cut == 1
    torch.testing.assert_close(cut, scorer(PICTURES[:1], [short]))
    assert scorer.cut == 1
    assert HumanPreferenceScore("2.0", str(hps[0]), CPU, TINY_HPS)(PICTURES[:1], [LONG]).shape == (1, 1)
    for other, prompts in (
        (HumanPreferenceScore("2.0", str(hps[0]), CPU, TINY_HPS), [LONG, LONG + " dog"]),
        (ImageReward(str(reward[0]), str(reward[1]), CPU), [" ".join(["a"] * 33), " ".join(["a"] * 34)]),
    ):
        other(PICTURES[:2], prompts)
        assert other.cut == (2 if "HPS" in other.names[0] else 1)


def test_hps_is_a_hundred_cosines_of_open_clip(hps):
    import open_clip

    first, second = (
        HumanPreferenceScore(v, str(file), CPU, TINY_HPS) for v, file in zip(("2.0", "2.1"), hps, strict=True)
    )
    assert (first.names, second.names) == (("HPSv2.0 x100",), ("HPSv2.1 x100",))
    model = open_clip.create_model(TINY_HPS, pretrained=None).eval()
    model.load_state_dict(torch.load(hps[0], weights_only=True)["state_dict"])
    tokens = open_clip.get_tokenizer(TINY_HPS)(PROMPTS)
    with torch.no_grad():
        seen, read, _ = model(torch.stack([shown_to_hps(image, SIDE) for image in PICTURES]), tokens)
    expected = 100 * (seen * read).sum(1).double()  # open_clip's forward normalises
    torch.testing.assert_close(first(PICTURES, PROMPTS)[:, 0], expected, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(first(PICTURES, PROMPTS), second(PICTURES, PROMPTS), atol=0.1)
    assert "HPS_v2.1_compressed.pt, sha256" in second.protocol and "HPSv2.1, 100 cos: tiny-hps" in second.protocol
    refuse_one_for_both(first, second)
    with pytest.raises(UserError, match="have the same weights"):
        refuse_one_for_both(first, HumanPreferenceScore("2.1", str(hps[0]), CPU, TINY_HPS))


def test_hps_sees_the_whole_picture_between_black_bars():
    wide = T.to_tensor(picture(0, 64, 32))
    grown = T.resize(wide, [16, 32], T.InterpolationMode.BICUBIC, antialias=True)  # as hpsv2 1.2.0 does
    expected = T.normalize(T.pad(grown, [0, 8, 0, 8]), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(shown_to_hps(picture(0, 64, 32), SIDE), expected, atol=1e-5, rtol=0)
    assert shown_to_hps(picture(0, 20, 32), SIDE).shape == shown_to_hps(picture(0, 500, 1), SIDE).shape == (3, 32, 32)


def reward_by_hand(state: dict[str, Tensor], image: Tensor, ids: Tensor, mask: Tensor) -> float:
    """ImageReward of one picture [1, 3, 32, 32] and one prompt [1, T], from the tensors alone."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        out = []
        for head in range(q.shape[-1] // 64):
            part = slice(64 * head, 64 * head + 64)
            scores = q[..., part] @ k[..., part].mT / 8
            if seen is not None:
                scores = scores.masked_fill(seen[:, None] == 0, -torch.inf)
            out.append(scores.softmax(-1) @ v[..., part])
        return torch.cat(out, -1)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(image, state[f"{vision}.patch_embed.proj.weight"], state[f"{vision}.patch_embed.proj.bias"], 16)
    x = torch.cat([state[f"{vision}.cls_token"], patches.flatten(2).mT], 1) + state[f"{vision}.pos_embed"]
    for block in (f"{vision}.blocks.{i}" for i in range(2)):
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{vision}.norm", 1e-6)
    words, places = (f"{text}.embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))
    h = norm(state[words][ids] + state[places][: ids.shape[1]], f"{text}.embeddings.LayerNorm", 1e-12)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for kind, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            other = h if source is None else source
            q, k, v = (
                linear(y, f"{layer}.{kind}.self.{n}") for y, n in ((h, "query"), (other, "key"), (other, "value"))
            )
            out = linear(attend(q, k, v, hidden), f"{layer}.{kind}.output.dense")
            h = norm(h + out, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        out = linear(F.gelu(linear(h, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        h = norm(h + out, f"{layer}.output.LayerNorm", 1e-12)
    y = h[:, 0]
    for place in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{place}")
    return (float(y) - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_that_of_its_tensors(reward):
    scorer = ImageReward(str(reward[0]), str(reward[1]), CPU)
    words = {word: number for number, word in enumerate((reward[1] / "vocab.txt").read_text().split())}
    state, expected = reward_state(), []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        ids = [words["[CLS]"], *(words[word] for word in prompt.split()), words["[SEP]"]]
        mask = torch.tensor([[1] * len(ids) + [0] * (35 - len(ids))])
        padded = torch.tensor([ids + [0] * (35 - len(ids))])
        expected.append(reward_by_hand(state, shown_to_reward(image, SIDE)[None], padded, mask))
    found = scorer(PICTURES, PROMPTS)
    torch.testing.assert_close(found[:, 0], torch.tensor(expected).double(), atol=1e-4, rtol=1e-4)
    assert found.std() > 0.01 and "ImageReward.pt, sha256" in scorer.protocol


def test_image_reward_sees_what_torchvision_cuts():
    image = picture(0, 80, 50)
    box = (round((51 - 32) / 2), 0, round((51 - 32) / 2) + 32, 32)
    expected = T.normalize(T.to_tensor(image.resize((51, 32), Image.Resampling.BICUBIC).crop(box)), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(shown_to_reward(image, 32), expected)


def test_means_errors_and_protocols(clip, tmp_path):
    drawn = open_prompted(write_sampled(tmp_path / "drawn", [{"prompt": p} for p in PROMPTS], each=2))
    scorer, seen = PickScore(str(clip), None, CPU), []
    [(name, measured)] = measure_scores(drawn, [scorer], lambda done, total: seen.append((done, total))).items()
    assert name == "PickScore" and list(measured.values) == ["PickScore", "PickScore cosine"] and seen == [(6, 6)]
    scores = measured.extra["scores"]
    assert measured.values["PickScore"] == pytest.approx(float(scores[:, 0].mean()))
    by_prompt = scores[:, 0].view(3, 2).mean(1)
    assert f"standard error over prompts {float(by_prompt.std() / 3**0.5):.3g}," in measured.protocol
    assert f"prompts drawn/prompts.jsonl, n=3, sha256 {drawn.prompts.sha256[:16]}" in measured.protocol


def test_a_mean_below_zero_is_cut_off_as_in_torchmetrics(clip, tmp_path, monkeypatch):
    drawn = open_prompted(write_sampled(tmp_path / "drawn", [{"prompt": "a dog"}]))
    scorer = ClipScore(str(clip), CPU)
    monkeypatch.setattr(scorer, "cosines", lambda pictures, prompts: torch.tensor([-0.5, 0.1]).double())
    monkeypatch.setattr(ClipScore, "protocol", "p")
    monkeypatch.setattr(ClipScore, "cut", 0)
    assert measure_scores(drawn, [scorer])["CLIP score x100"].values == {"CLIP score x100": 0.0}
    monkeypatch.setattr(scorer, "cosines", lambda pictures, prompts: torch.full((2,), torch.nan))
    with pytest.raises(UserError, match="of 2 pictures is not finite"):
        measure_scores(drawn, [scorer])


def test_places_of_weights(tmp_path):
    assert place_of("clip", str(tmp_path)).local
    found = place_of("clip", "openai/clip-vit-large-patch14@32bd643")
    assert (found.name, found.revision, found.local) == ("openai/clip-vit-large-patch14", "32bd643", False)
    for given in ("weights/clip.pt", "/nowhere/at/all", "../clip", "a b"):
        with pytest.raises(UserError, match=r"--clip .*: there is no such file or folder"):
            place_of("clip", given)


def test_the_hub_is_asked_for_the_revision_and_its_commit_is_told(monkeypatch, tmp_path, hps):
    import huggingface_hub

    folder = tmp_path / "snapshots" / "0123456789abcdef"
    folder.mkdir(parents=True)
    asked = []

    def fetched(repository, name, revision):
        asked.append((repository, name, revision))
        (folder / name).write_bytes(hps[1].read_bytes())
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    scorer = HumanPreferenceScore("2.1", "xswu/HPSv2@main", CPU, TINY_HPS)
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt", "main")]
    assert "xswu/HPSv2@0123456789ab, HPS_v2.1_compressed.pt, sha256" in scorer.protocol

    def refused(repository, name, revision):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(UserError, match=r"xswu/HPSv2 could not be had from the hub \(OSError: no network\)"):
        HumanPreferenceScore("2.0", "xswu/HPSv2", CPU, TINY_HPS)


def test_other_weights_are_refused(tmp_path, hps, reward):
    other = tmp_path / "other.pt"
    torch.save({"x": torch.ones(1)}, other)
    with pytest.raises(UserError, match="missing"):
        HumanPreferenceScore("2.0", str(other), CPU, TINY_HPS)
    with pytest.raises(UserError, match="has no tensor blip"):
        ImageReward(str(other), str(reward[1]), CPU)
    state = reward_state()
    del state["mlp.layers.4.bias"], state["blip.visual_encoder.norm.bias"]
    torch.save(state, other)
    with pytest.raises(UserError, match=r"2 missing: vision.post_layernorm.bias, mlp.4.bias"):
        ImageReward(str(other), str(reward[1]), CPU)
    torch.save(reward_state(words=8), other)
    with pytest.raises(UserError, match="has 12 words, the network 8"):
        ImageReward(str(other), str(reward[1]), CPU)


def test_a_missing_package_is_named(monkeypatch):
    def load():
        raise ModuleNotFoundError("No module named 'open_clip'")

    with pytest.raises(UserError, match=r"pip install 'aligntok\[t2i-metrics\]'"):
        scorer_weights.asked_of_hub("hpsv2", scorer_weights.Place("x", None, True), load)


def test_sharded_weights_are_known_by_all_of_their_files(clip, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip)
    place = scorer_weights.Place(str(tmp_path), None, True)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())) > 1
    before = scorer_weights.told_pretrained(place, model)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert scorer_weights.told_pretrained(place, model) != before
