"""Pipelines for classes and for prompts, with FlowMatchEulerDiscreteScheduler.

They draw what `aligntok sample` draws: the same noise for the same seed, the same grid of times, guidance on the same
channels in the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from aligntok.config import SamplerConfig, TextEncoderConfig
from aligntok.config.from_dict import from_dict
from aligntok.data.geometry import check_size
from aligntok.diffusers.autoencoder import AutoencoderAlignTok
from aligntok.diffusers.transformers import (
    TIMESTEPS,
    AlignTokFluxTransformer2DModel,
    LightningDiTTransformer2DModel,
)
from aligntok.diffusion.condition import Condition
from aligntok.diffusion.sampler import check_sampler, evaluate
from aligntok.errors import UserError
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.text_encoder import TextEncoder
from aligntok.runtime.devices import Precision

Generators = torch.Generator | list[torch.Generator] | None


class _Pipeline(DiffusionPipeline):
    """The loop; what is asked for is the subclasses' business."""

    vae: AutoencoderAlignTok
    transformer: LightningDiTTransformer2DModel | AlignTokFluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler

    def _sampler(self, steps: int | None, guidance: float | None) -> SamplerConfig:
        """The generator's defaults, less what the call says; UserError for what cannot be drawn."""
        defaults = from_dict(SamplerConfig, dict(self.config.sampler or {}))
        given = {"steps": steps, "guidance": guidance}
        chosen = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        check_sampler(chosen, self.transformer.config.in_channels)
        return chosen

    def _shape(self, count: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Of the latents of `count` pictures of a size in pixels; None = as in training."""
        rows, columns = self.transformer.config.sample_size
        for side in (height, width):
            if side is not None:
                check_size(side, self.vae.downsample, "height or width")
        rows = rows if height is None else height // self.vae.downsample
        columns = columns if width is None else width // self.vae.downsample
        return count, self.transformer.config.in_channels, rows, columns

    def _velocity(self, z: Tensor, times: Tensor, *condition: Tensor) -> Tensor:
        return self.transformer(z, times * TIMESTEPS, *condition, return_dict=False)[0].float()

    def _draw(self, condition: Condition, latents: Tensor, sampler: SamplerConfig) -> Tensor:
        """Noise [B, d, h, w] -> latents of pictures, float32."""
        grid = np.linspace(1, 0, sampler.steps + 1)[:-1]
        self.scheduler.set_timesteps(sigmas=list(grid), device=latents.device)
        z = latents.float()
        for time in self.progress_bar(self.scheduler.timesteps):
            velocity, scale = evaluate(self._velocity, z, float(time) / TIMESTEPS, condition, sampler)
            step = _guided(velocity, scale, sampler.guidance_channels) if len(velocity) > len(z) else velocity
            z = self.scheduler.step(step, time, z, return_dict=False)[0]
        return z

    def _finished(self, latents: Tensor, output_type: str, return_dict: bool) -> Any:
        """Pictures of latents, as the caller wants them."""
        images: Any = latents
        if output_type != "latent":
            decoded = self.vae.decode(latents, return_dict=False)[0]
            images = VaeImageProcessor().postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _guided(velocity: Tensor, scale: float, channels: int | None) -> Tensor:
    """Of both halves of a batch, what is asked for first: null + scale (given - null), on the first channels."""
    given, null = velocity.chunk(2)
    led = null + scale * (given - null)
    return led if channels is None else torch.cat((led[:, :channels], given[:, channels:]), dim=1)


class AlignTokPipeline(_Pipeline):
    """Pictures of classes.

    Args:
        vae, transformer, scheduler: the parts.
        classes: names, in the order of their numbers.
        sampler: the generator's defaults, as its folder's config.json has them.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: AutoencoderAlignTok,
        transformer: LightningDiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        classes: list[str] | None = None,
        sampler: dict[str, Any] | None = None,
        tokenizer_fingerprint: str = "",
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(classes=classes, sampler=sampler, tokenizer_fingerprint=tokenizer_fingerprint)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One picture for each of `class_labels`, numbers or names.

        Args:
            num_inference_steps, guidance_scale: None = the generator's defaults. 1 is no guidance.
            height, width: in pixels; None = as in training.
            generator: of the noise; `torch.Generator().manual_seed(seed)` gives what `aligntok sample --seed` draws.
            latents: the noise itself, [B, d, h, w].
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent".

        Raises:
            ValueError: an unknown class, or what the sampler refuses.
        """
        sampler = self._sampler(num_inference_steps, guidance_scale)
        device = self._execution_device
        labels = torch.tensor(self._numbers(class_labels), device=device)
        shape = self._shape(len(labels), height, width)
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device)
        network = self.transformer.network
        assert isinstance(network, LightningDiT)  # the class of `transformer` says so
        condition = Condition.of_labels(labels, network.null_class)
        return self._finished(self._draw(condition, noise, sampler), output_type, return_dict)

    def _numbers(self, labels: Sequence[int | str] | int | str) -> list[int]:
        """Class numbers of numbers or names; UserError for others."""
        names, found = self.config.classes or [], []
        for label in [labels] if isinstance(labels, (int, str)) else labels:
            if isinstance(label, str) and label not in names:
                raise UserError(f"no class {label!r}: expected one of {', '.join(names)}, or a number")
            found.append(names.index(label) if isinstance(label, str) else int(label))
        return found


class AlignTokTextToImagePipeline(_Pipeline):
    """Pictures of prompts.

    Args:
        vae, transformer, scheduler: the parts.
        text_encoder, tokenizer: transformers' model and tokenizer whose features the transformer was trained on.
        features: which of its layers, and how many tokens, as a generator folder's config.json has them.
        sampler: the generator's defaults, as there.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderAlignTok,
        transformer: AlignTokFluxTransformer2DModel,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: FlowMatchEulerDiscreteScheduler,
        features: dict[str, Any] | None = None,
        text_fingerprint: str = "",
        sampler: dict[str, Any] | None = None,
        tokenizer_fingerprint: str = "",
    ) -> None:
        super().__init__()
        parts = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler, **parts)
        self.register_to_config(features=features, text_fingerprint=text_fingerprint)
        self.register_to_config(sampler=sampler, tokenizer_fingerprint=tokenizer_fingerprint)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """`num_images_per_prompt` pictures of each prompt, those of a prompt in a row; arguments as AlignTokPipeline's.

        Args:
            negative_prompt: what guidance leads away from; the empty caption is what training had.

        Raises:
            ValueError: an empty prompt, or what the sampler refuses.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(text.strip() for text in prompts):
            raise UserError("the prompt is empty: give a text, such as 'a red fox'")
        sampler = self._sampler(num_inference_steps, guidance_scale)
        device = self._execution_device
        shape = self._shape(len(prompts) * num_images_per_prompt, height, width)
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device)
        condition = self._encoded(prompts, negative_prompt, num_images_per_prompt, device)
        return self._finished(self._draw(condition, noise, sampler), output_type, return_dict)

    def _encoded(self, prompts: list[str], negative: str, each: int, device: torch.device) -> Condition:
        config = from_dict(TextEncoderConfig, dict(self.config.features or {}))
        encoder = TextEncoder(config, Precision(device, "fp32"), (self.tokenizer, self.text_encoder))
        given = tuple(part.repeat_interleave(each, dim=0) for part in encoder.encode(prompts))
        null = tuple(part.expand(len(given[0]), *part.shape[1:]) for part in encoder.encode([negative]))
        return Condition(given, null)
