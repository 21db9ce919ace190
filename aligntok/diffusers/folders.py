"""Folders of this project and of diffusers, there and back without loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from aligntok.config import SamplerConfig, TextEncoderConfig
from aligntok.config.from_dict import from_dict
from aligntok.diffusers.autoencoder import AutoencoderAlignTok
from aligntok.diffusers.pipelines import AlignTokPipeline, AlignTokTextToImagePipeline
from aligntok.diffusers.transformers import AlignTokFluxTransformer2DModel, LightningDiTTransformer2DModel
from aligntok.errors import UserError
from aligntok.evaluation.generation import check_pair
from aligntok.models.generator import Generator, TextSource, save_generator
from aligntok.models.text_encoder import TextEncoder
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import Precision
from aligntok.runtime.files import check_destination, unfinished_folder
from aligntok.runtime.hub import located
from aligntok.runtime.manifest import Manifest
from aligntok.runtime.weights import in_short

Pipeline = AlignTokPipeline | AlignTokTextToImagePipeline
PIPELINES: tuple[type[Pipeline], ...] = (AlignTokPipeline, AlignTokTextToImagePipeline)
ENTRIES = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")  # of a pipeline
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def to_diffusers(
    tokenizer: str, generator: str | None, output: str, dtype: str = "fp32", shard_size: str = "10GB"
) -> str:
    """Write a tokenizer as an autoencoder, or with a generator as a pipeline; returns what to report.

    Args:
        dtype: fp32, fp16 or bf16; the halves are a `variant` of that name.
        shard_size: of a file of weights at most, as diffusers reads it.

    Raises:
        UserError: folders that cannot be read or do not belong together, a sampler that diffusers' scheduler is not.
    """
    check_destination(output, None if generator is None else ENTRIES)
    vae = autoencoder_of(tokenizer)
    what = vae if generator is None else pipeline_of(vae, generator)
    variant = None if dtype == "fp32" else dtype
    with unfinished_folder(Path(output)) as unfinished:
        _cast(what, DTYPES[dtype])
        what.save_pretrained(unfinished, safe_serialization=True, variant=variant, max_shard_size=shard_size)
    size = sum(file.stat().st_size for file in Path(output).rglob("*") if file.is_file())
    given = "" if variant is None else f", variant={variant!r}, torch_dtype=torch.{str(DTYPES[dtype])[6:]}"
    name = type(what).__name__
    return (
        f"{output}: {name} in {dtype}, {size / 1e6:,.1f} MB\n"
        f"  from aligntok.diffusers import {name}\n"
        f'  {name}.from_pretrained("{output}"{given})'
    )


def _cast(what: AutoencoderAlignTok | Pipeline, dtype: torch.dtype) -> None:
    """All weights, but for what our networks keep in float32; diffusers' own `to` warns that it does not know that."""
    if dtype == torch.float32:
        return
    vae = what if isinstance(what, AutoencoderAlignTok) else what.vae
    vae.tokenizer.to(dtype)
    if not isinstance(what, AutoencoderAlignTok):
        what.transformer.network.to(dtype)
    if isinstance(what, AlignTokTextToImagePipeline):
        what.text_encoder.to(dtype)


def autoencoder_of(folder: str) -> AutoencoderAlignTok:
    """The autoencoder of a tokenizer's folder."""
    return AutoencoderAlignTok.of(
        load_tokenizer(folder), Manifest(located(folder, "tokenizer"), "tokenizer").values["config"]
    )


def pipeline_of(vae: AutoencoderAlignTok, folder: str) -> Pipeline:
    """The pipeline of a generator's folder, with the tokenizer whose latents it was trained on."""
    generator = Generator(folder)
    check_pair(generator, vae.tokenizer)
    if generator.sampler.solver != "euler" or generator.sampler.end:
        raise UserError(
            f"{folder} draws with sampler.solver={generator.sampler.solver} and sampler.end={generator.sampler.end:g}, "
            "and diffusers' FlowMatchEulerDiscreteScheduler is Euler's method down to 0: it cannot be exported"
        )
    values = Manifest(located(folder, "generator"), "generator").values
    scheduler = FlowMatchEulerDiscreteScheduler(shift=generator.sampler.time_shift)
    own = {"network_config": values["config"], "in_channels": generator.latent_shape[0]}
    own["sample_size"] = tuple(generator.latent_shape[1:])
    kept = {"sampler": values["sampler"], "tokenizer_fingerprint": generator.tokenizer_fingerprint}
    if generator.text is None:
        transformer = LightningDiTTransformer2DModel.of(generator.model, **own)
        return AlignTokPipeline(vae, transformer, scheduler, classes=generator.classes, **kept)
    encoder = TextEncoder(generator.text.encoder, Precision(torch.device("cpu"), "fp32"))
    if encoder.fingerprint() != generator.text.fingerprint:
        raise UserError(f"{folder} was trained with another text encoder than {encoder.name} is here")
    network = AlignTokFluxTransformer2DModel.of(generator.model, text_width=encoder.width, **own)
    tokens, model = encoder.parts
    kept |= {"features": values["text"]["encoder"], "text_fingerprint": generator.text.fingerprint}
    return AlignTokTextToImagePipeline(vae, network, model, tokens, scheduler, **kept)


def convert(folder: Path, output: Path) -> str:
    """Turn what `to_diffusers` has written back: a tokenizer's folder, or one with `tokenizer` and `generator` inside.

    Raises:
        UserError: another model's folder, or one that cannot be read.
    """
    pipeline = folder / "model_index.json"
    file = pipeline if pipeline.is_file() else folder / "config.json"
    known: dict[str, Any] = {kind.__name__: kind for kind in (*PIPELINES, AutoencoderAlignTok)}
    name = _class_name(file)
    if name not in known:
        raise UserError(f"{file} is of {name or 'no class'}, expected one of {', '.join(known)}")
    found = _loaded(lambda: known[name].from_pretrained(folder), folder)
    if isinstance(found, AutoencoderAlignTok):
        found.tokenizer.save(output)
        return f"{output}: tokenizer, fingerprint {found.tokenizer.fingerprint()}"
    with unfinished_folder(output) as unfinished:
        found.vae.tokenizer.save(unfinished / "tokenizer")
        _save_generator(found, unfinished / "generator")
    return f"{output}: tokenizer and generator"


def _class_name(file: Path) -> str | None:
    if not file.is_file():
        raise UserError(f"{file} is missing: expected a folder that diffusers' save_pretrained has written")
    try:
        return json.loads(file.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read as JSON settings ({in_short(error)})") from error


def _loaded(load: Callable[[], Any], folder: Path) -> Any:
    try:
        return load()
    except Exception as error:  # diffusers raises many kinds: each means that the folder cannot be used
        raise UserError(f"{folder} cannot be read by diffusers ({in_short(error)})") from error


def _save_generator(pipeline: Pipeline, folder: Path) -> None:
    network, config = pipeline.transformer.network, pipeline.config
    text = None
    if isinstance(pipeline, AlignTokTextToImagePipeline):
        encoder = from_dict(TextEncoderConfig, dict(config.features))
        text = TextSource(encoder, config.text_fingerprint)
    save_generator(
        folder,
        network,
        network.state_dict(),
        from_dict(SamplerConfig, dict(config.sampler)),
        list(config.classes) if text is None else [],
        config.tokenizer_fingerprint,
        text,
    )
