"""Every switch of a recipe: how it is turned in test_switches.py and what comes of it, or where else it is tested.

A field of a recipe that is in neither table makes a test fail, and so does a word that a field knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from switches import Check, Outcome, Switch, near, other, same

from aligntok.config import (
    AlignmentConfig,
    DinoDiscriminatorConfig,
    EncoderConfig,
    EvaluationConfig,
    MAETokConfig,
    MAETokLossConfig,
    RAEConfig,
    RepaEConfig,
    VAEConfig,
    ViTDecoderConfig,
)


def logs(*names: str, without: str | None = None, effect: Check = other) -> Check:
    """The last record has these values, and not that one."""

    def logged(found: Outcome, plain: Outcome) -> None:
        effect(found, plain)
        assert set(names) <= found.records[-1].keys() and without not in found.records[-1]

    return logged


def leaves(pattern: str, count: int = 1, effect: Check = same) -> Check:
    """So many files or folders of a name."""

    def left(found: Outcome, plain: Outcome) -> None:
        effect(found, plain)
        assert len(list(found.folder.glob(pattern))) == count, sorted(found.folder.rglob("*"))

    return left


def says(text: str, effect: Check = other) -> Check:
    def said(found: Outcome, plain: Outcome) -> None:
        effect(found, plain)
        assert text in " ".join(found.said.split())

    return said


def stops(text: str) -> Check:
    """Status 2 and one line, after a traceback-free run."""

    def refused(found: Outcome, plain: Outcome) -> None:
        assert found.status == 2 and text in found.said.splitlines()[-1], found.said

    return refused


def steps(*numbers: int, effect: Check = other) -> Check:
    """Records of these steps."""

    def taken(found: Outcome, plain: Outcome) -> None:
        effect(found, plain)
        assert [record["step"] for record in found.records] == list(numbers)

    return taken


def draws_otherwise(found: Outcome, plain: Outcome) -> None:
    """The same weights, another preview, and a generator's folder that remembers it."""
    same(found, plain)
    assert found.previews.keys() == plain.previews.keys() and found.previews != plain.previews
    stored, before = (
        json.loads((o.folder / "generator" / "config.json").read_text())["sampler"] for o in (found, plain)
    )
    assert stored != before


def resized(found: Outcome, plain: Outcome) -> None:
    """The same tensors in other shapes."""
    assert found.weights.keys() == plain.weights.keys()
    assert any(value.shape != plain.weights[name].shape for name, value in found.weights.items())


def generator(check: Check, beside: dict[str, Any] | None = None, **fields: Any) -> Switch:
    named = {f"generator.{name.replace('__', '.')}": value for name, value in fields.items()}
    return Switch("generator", named, check, {f"generator.{k}": v for k, v in (beside or {}).items()})


def text(check: Check, **fields: Any) -> Switch:
    return Switch("text", {f"generator.text.{name.replace('__', '.')}": value for name, value in fields.items()}, check)


def data(check: Check, beside: dict[str, Any] | None = None, **fields: Any) -> Switch:
    named = {f"data.{name}": value for name, value in fields.items()}
    return Switch("generator", named, check, {f"data.{k}": v for k, v in (beside or {}).items()})


def stage2(check: Check, beside: dict[str, Any] | None = None, **fields: Any) -> Switch:
    named = {f"tokenizer.stages.stage2.{name.replace('__', '.')}": value for name, value in fields.items()}
    return Switch("tokenizer", named, check, beside or {})


def tokenizer(check: Check, beside: dict[str, Any] | None = None, **fields: Any) -> Switch:
    named = {f"tokenizer.{name.replace('__', '.')}": value for name, value in fields.items()}
    return Switch("tokenizer", named, check, {f"tokenizer.{k}": v for k, v in (beside or {}).items()})


def losses(check: Check, beside: dict[str, Any] | None = None, **fields: Any) -> Switch:
    inner = {f"losses.{name}": value for name, value in (beside or {}).items()}
    return tokenizer(check, inner, **{f"losses__{name}": value for name, value in fields.items()})


def rival(check: Check, kind: str, beside: dict[str, Any] | None = None, **fields: Any) -> Switch:
    named = {f"rival.{name.replace('__', '.')}": value for name, value in fields.items()}
    return Switch("rival", named, check, {f"rival.{k}": v for k, v in (beside or {}).items()}, kind)


EVERY = {"training.checkpoint_every": 1}
WILD = {"factor": 1e-3, "window": 2, "rewind": False, "max_rewinds": 1}
GUIDED = {"sampler.guidance": 4.0, "sampler.guidance_interval": [0.0, 1.0]}
HEAD = {"model.head_depth": 1, "model.head_width": 48, "model.head_heads": 2}

TRAINING = [
    generator(other, training__batch_size=2),
    generator(other, training__precision="bf16"),
    generator(other, training__seed=7),
    generator(same, training__device="cpu"),
    generator(same, training__checkpoint_every=2),
    generator(same, EVERY, training__keep_checkpoints=1),
    generator(steps(2, 4, effect=same), training__log_every=2),
    generator(stops("2 in a row, so training stops"), training__nonfinite_limit=2, learning_rate=1e30),
    generator(same, training__parallel="fsdp"),
    generator(near, training__accumulate=2),
    generator(leaves("checkpoints/generator/best-*"), EVERY, training__keep_best="mse"),
    generator(says("is a spike: median", same), training__spike=WILD, beside={"steps": 8}),
    generator(stops("spikes again, so it stops"), EVERY | {"steps": 8}, training__spike=WILD | {"rewind": True}),
    generator(leaves("previews/generator-*.png", 2), training__preview_every=2),
    generator(leaves("previews/*.png", 0), training__preview_every=0),
    generator(leaves("profile/generator.json.gz"), {"steps": 7}, training__profile=1),
    generator(same, training__checkpointing="selective"),
    generator(same, training__checkpointing="full"),
    generator(near, training__compile=True),
    generator(near, training__optimizer="apex"),
    tokenizer(same, training__checkpointing="selective"),
    tokenizer(same, training__checkpointing="full"),
    tokenizer(near, training__compile=True),
    tokenizer(other, training__accumulate=2),
    tokenizer(near, training__optimizer="apex"),
]
GENERATOR = [
    generator(steps(1, 2), steps=2),
    generator(other, learning_rate=1e-3),
    generator(other, betas=[0.5, 0.9]),
    generator(other, warmup_steps=2),
    generator(other, final_learning_rate=0.1),
    generator(other, ema_decay=0.1),
    generator(other, gradient_clip=1e-3),
    generator(other, {"gradient_clip": 1e-3}, gradient_clip=None),
    generator(leaves("snapshots/generator-*", 2), snapshot_every=2),
    generator(other, model__depth=2),
    generator(other, model__width=64),
    generator(other, model__heads=4),
    generator(other, model__patch_size=2),
    generator(other, model__classes=5),
    generator(other, model__label_dropout=0.9),
    generator(other, model__qk_norm=True),
    generator(other, model__shift=False),
    generator(same, model__attention="sdpa"),
    generator(other, **{name.replace(".", "__"): value for name, value in HEAD.items()}),
    generator(other, HEAD, model__head_width=96),
    generator(other, HEAD, model__head_heads=4),
    generator(other, flow__time_sampling="uniform"),
    generator(other, flow__direction_weight=0.0),
    generator(other, flow__time_shift=3.0),
    generator(draws_otherwise, sampler__solver="heun"),
    generator(draws_otherwise, sampler__steps=8),
    generator(draws_otherwise, sampler__time_shift=6.0),
    generator(draws_otherwise, sampler__end=0.1),
    generator(draws_otherwise, GUIDED | {"sampler.guidance": 1.0}, sampler__guidance=4.0),
    generator(draws_otherwise, GUIDED, sampler__guidance_channels=3),
    generator(draws_otherwise, GUIDED, sampler__guidance_interval=[0.0, 0.5]),
]
TEXT = [
    text(says("more than 4 tokens and are cut"), encoder__tokens=4),
    text(other, encoder__layer=1),
    text(stops("text.encoder.width is 48, but the features"), encoder__width=48),
    text(other, dropout=0.9),
    text(resized, model__width=64),
    text(other, model__heads=1),
    text(other, model__double_blocks=2),
    text(other, model__single_blocks=2),
    text(other, model__mlp="gelu"),
    text(other, model__mlp_ratio=4.0),
    text(other, model__per_block_modulation=True),
    text(other, model__patch_size=2),
    text(other, model__rope_axes=[8, 4, 4]),
    text(other, model__rope_theta=100.0),
    text(other, model__centred_positions=True),
    text(other, model__mask="none"),
    text(other, model__pad_to=8),
    text(same, model__attention="sdpa"),
    text(stops("'fused', which cannot run here"), model__attention="fused"),
    Switch("text", {"generator.training.checkpointing": "full"}, same),
    Switch("text", {"generator.training.checkpointing": "selective"}, same),
    Switch("text", {"generator.training.compile": True}, near),
    Switch("text", {"generator.training.accumulate": 2}, near),
    Switch("text", {"generator.training.parallel": "fsdp"}, same),
    Switch("text", {"data.memory_limit_gib": 1e-5, "data.workers": 0}, says("frozen networks run in the loop", near)),
    Switch("text", {"data.buckets": "area"}, says("in 1 size: 16 of 32 x 32")),
    Switch("text", {"data.buckets": "short_side"}, says("in 1 size: 16 of 32 x 32")),
]
STREAMED = {"memory_limit_gib": 0.0, "workers": 0}
DATA = [
    data(says("13 pictures of Fluent emoji"), path="embedded", max_images=16),
    data(other, image_size=64),
    data(other, flip=False),
    data(says("12 pictures"), held_out=0.4),
    data(says("8 pictures"), max_images=10),
    data(says("frozen networks run in the loop", near), memory_limit_gib=0.0, workers=0),
    data(same, STREAMED, workers=1),
    data(says("as data.loader says", same), STREAMED, loader="torchvision"),
    data(says("loader: DALI on the CPU"), STREAMED, loader="dali"),
    data(same, STREAMED, stall_timeout=0.0),
]
STAGE = [
    stage2(near, trains=["decoder", "adapter", "encoder"]),
    stage2(logs("l1", without="gan"), trains=["encoder"], gan_start=3),
    stage2(other, trains=["adapter", "decoder"]),
    stage2(steps(1, 2), steps=2),
    stage2(other, learning_rate=1e-4),
    stage2(other, adapter_learning_rate=1e-4),
    stage2(other, encoder_learning_rate=1e-4),
    stage2(other, discriminator_learning_rate=1e-3),
    stage2(other, warmup_steps=2),
    stage2(other, final_learning_rate=0.1),
    stage2(logs("l1", without="gan"), gan_start=3),
    stage2(logs("gan", without="semantic"), semantic__weight=0.0),
    stage2(logs("semantic"), semantic__kind="cosine"),
    stage2(logs("semantic"), semantic__position="before_adapter"),
    stage2(other, ema_decay=None),
    stage2(other, gradient_clip=1e-3),
    stage2(other, decoder_noise=0.3),
]
KINDS = ("lpips-vgg", "lpips-alex", "st-lpips-alex", "st-lpips-vgg")  # the weights of the first two: see `trunks`
LOSSES = [
    *(losses(logs("perceptual"), perceptual={"kind": kind, "weights": None}) for kind in KINDS),
    losses(other, {"perceptual.kind": KINDS[2]}, perceptual_weight=0.1),
    losses(other, {"perceptual.kind": KINDS[2]}, perceptual_share=0.5),
    losses(other, gan="non_saturating"),
    losses(logs("l1", without="discriminator"), gan_weight=0.0),
    losses(other, gan_weight_max=1e-3),
    losses(other, lecam_weight=1.0),
    losses(other, {"lecam_weight": 1.0}, lecam_decay=0.5),
    losses(other, discriminator__base_channels=4),
    losses(other, discriminator__layers=2),
]
MODEL = [
    tokenizer(says("frozen networks run in the loop", near), crop="random"),
    tokenizer(other, betas=[0.9, 0.95]),
    tokenizer(other, statistics_images=4),
    tokenizer(other, model__encoder__layer=0),
    tokenizer(other, model__encoder__final_norm=False),
    tokenizer(logs("semantic"), model__encoder__lora_rank=2),
    tokenizer(other, model__adapter__kind="linear"),
    tokenizer(other, model__adapter__hidden=16),
    tokenizer(other, model__adapter__latent_channels=4),
    tokenizer(other, model__decoder__base_channels=16),
    tokenizer(other, model__decoder__blocks=1),
    tokenizer(other, model__decoder__groups=2),
    tokenizer(other, model__decoder__channel_multipliers=[1, 1, 1, 2, 2]),
    tokenizer(other, model__decoder__attention_levels=[]),
]
RIVAL = [
    *(rival(same, kind, training__checkpointing="full") for kind in ("va-vae", "rae", "maetok", "repa-e")),
    rival(near, "rae", training__compile=True, training__checkpointing="selective"),
    rival(near, "vae", {"vae.encoder": "vit"}, training__compile=True),
    rival(near, "repa-e", {"stage.gan_start": 9}, training__compile=True),
    rival(other, "repa-e", {"stage.gan_start": 9}, training__accumulate=2),  # the bridge is a BatchNorm
    rival(other, "rae", discriminator="dino"),
    rival(other, "vae", kl_weight=1.0),
    rival(says("frozen networks run in the loop", near), "vae", crop="random"),
    rival(other, "vae", betas=[0.9, 0.95]),
    rival(other, "vae", statistics_images=4),
    rival(other, "vae", losses__gan="non_saturating", losses__lecam_weight=1.0),
    rival(steps(1, 2), "vae", stage__steps=2),
    rival(other, "vae", stage__learning_rate=1e-4),
    rival(other, "vae", stage__discriminator_learning_rate=1e-3),
    rival(other, "vae", stage__warmup_steps=2),
    rival(other, "vae", stage__final_learning_rate=0.1),
    rival(logs("l1", without="gan"), "vae", stage__gan_start=3),
    rival(logs("gan", "discriminator"), "vae", stage__discriminator_start=0),
    rival(other, "vae", stage__ema_decay=None),
    rival(other, "vae", stage__gradient_clip=1e-3),
]
SWITCHES = [*TRAINING, *GENERATOR, *TEXT, *DATA, *STAGE, *LOSSES, *MODEL, *RIVAL]


def trunks(folder: Path) -> dict[str, str]:
    """Files of random weights for LPIPS's networks, by kind."""
    import torch
    import torchvision

    found = {}
    torch.manual_seed(0)
    for kind, network in (("lpips-vgg", torchvision.models.vgg16), ("lpips-alex", torchvision.models.alexnet)):
        with torch.device("meta"):
            features = network(weights=None).features
        state = {f"features.{k}": torch.randn(v.shape) * 0.05 for k, v in features.state_dict().items()}
        torch.save(state, folder / f"{kind}.pth")
        found[kind] = str(folder / f"{kind}.pth")
    return found


# Fields that no switch above turns, with the tests that do; a class stands for all of its fields
ELSEWHERE: dict[Any, str] = {
    "output": "of every run another",
    "data.captions": "data/test_captions.py: of text to image alone",
    "rival.kind": "all of them in RIVAL",
    "generator.tokenizer": "given to every run of a generator",
    "generator.condition": "class in GENERATOR, text in TEXT",
    "generator.start": "training/test_text_to_image.py",
    "generator.text.features": "the same",
    "generator.text.encoder.name": "models/test_text_encoder.py",
    "generator.text.encoder.revision": "the same: of a hub, which no test reaches",
    "generator.latents": "test_switches.py, pairs with a latent cache",
    "tokenizer.stages.stage2.latents": "the same: Stage 3 alone takes it",
    "generator.training.wandb_project": "monitoring/test_trackers.py, with a package that stands in for wandb",
    "generator.model.size": "models/test_sizes.py: a named size takes a minute here",
    "generator.sampler.cuda_graph": "CUDA only: diffusion/test_cuda_graph.py",
    (EncoderConfig, "name"): "models/test_encoder.py",
    (EncoderConfig, "weights"): "models/test_encoder.py, zoo/test_finished.py",
    (EncoderConfig, "downsample"): "models/test_encoder.py",
    (EncoderConfig, "antialias"): "models/test_encoder.py",
    EvaluationConfig: "commands/test_quickstart.py, with the command that reads it",
    VAEConfig: "zoo/test_vae.py, test_train_rival.py; encoder above",
    AlignmentConfig: "zoo/test_va_vae.py",
    ViTDecoderConfig: "zoo/test_rae.py",
    RAEConfig: "zoo/test_rae.py, test_train_rival.py",
    DinoDiscriminatorConfig: "zoo/test_rae.py",
    MAETokConfig: "zoo/test_maetok.py",
    MAETokLossConfig: "zoo/test_maetok_objective.py",
    RepaEConfig: "zoo/test_repa_e.py, test_train_rival.py",
}
# Words of a field that cannot run here, or that are what the plain runs have
WORDS_ELSEWHERE = {
    "fused": "CUDA only, refused here: models/test_attention.py",
    "flash-attn": "the same",
    "tf32": "CUDA only, fp32 with the reason here: runtime/test_devices.py",
    "text": "what every switch in TEXT has: switches.Bench",
    "xformers": "the same",
    "S": "models/test_sizes.py",
    "B": "models/test_sizes.py",
    "L": "models/test_sizes.py",
    "XL": "models/test_sizes.py",
}
