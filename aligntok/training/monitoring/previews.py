"""Pictures during training: reconstructions of fixed pictures, samples of fixed noise and labels.

They show the moving averages where a part keeps them, since these become its result. Taking them leaves the training
as it was, to the bit: random state, train and eval modes and gradients are restored, and no autocast cache is shared.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from aligntok.data.geometry import to_unit_range
from aligntok.data.images import ImageSet, load_center_crops
from aligntok.diffusion.condition import Condition
from aligntok.diffusion.sampler import integrate
from aligntok.models.generator import Network
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.report.pictures import by_class, sheet
from aligntok.runtime.devices import Precision
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.tokenizer_objective import AutoencoderObjective

PICTURES = 8  # reconstructed in a preview
CLASSES, PER_CLASS = 12, 2  # drawn in a preview
COLUMN = 18  # letters of a caption above its pictures
SAMPLER_STEPS = 24  # at most, of the configured number: a glance needs no more
SIDE = 128  # pixels; smaller pictures are enlarged to about this


@contextmanager
def undisturbed(device: torch.device, *networks: nn.Module) -> Iterator[None]:
    """Evaluation without gradients that leaves modes, random state and the shards of FSDP2 as they were."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for network in networks:
                network.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
                if isinstance(module, FSDPModule):  # a forward pass without a backward pass leaves it gathered
                    module.reshard()


class TokenizerPreview:
    """PNG of originals above their reconstructions; `images` are the held-out ones, or others where none are."""

    def __init__(self, objective: AutoencoderObjective, images: ImageSet, size: int, precision: Precision) -> None:
        self.objective, self.images, self.size, self.precision = objective, images, size, precision
        self._originals: Tensor | None = None

    @property
    def originals(self) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1], read when the first preview is due."""
        if self._originals is None:
            chosen = self.images.subset(list(range(min(PICTURES, len(self.images)))))
            self._originals = to_unit_range(load_center_crops(chosen, self.size)[0])
        return self._originals

    def __call__(self) -> bytes:
        device, tokenizer = self.precision.device, self._averaged()
        with undisturbed(device, tokenizer), self.precision.autocast():
            restored = tokenizer.reconstruct(tokenizer.raw_latents(self.originals.to(device))).float().cpu()
        return _sheet([self.originals, restored], ["Original", "Reconstruction"])

    def _averaged(self) -> StoredTokenizer:
        """The tokenizer with moving averages in the place of the parts that have them; weights are not copied."""
        shown = copy.copy(self.objective.tokenizer)
        averages = {} if self.objective.ema is None else dict(self.objective.ema.module.named_children())
        shown._modules = {name: averages.get(name, part) for name, part in shown._modules.items()}
        return shown


@dataclass(frozen=True)
class Shown:
    """What a generator's previews show: a column for each name, PER_CLASS pictures of it one after the other."""

    names: list[str]
    condition: Condition


def classes_shown(classes: Sequence[str], null_class: int) -> Shown:
    """Some of the classes."""
    count = min(CLASSES, len(classes))
    chosen = [index * len(classes) // count for index in range(count)]
    labels = torch.tensor(chosen).repeat_interleave(PER_CLASS)
    return Shown([classes[index] for index in chosen], Condition.of_labels(labels, null_class))


def captions_shown(names: list[str], text: Tensor, lengths: Tensor, empty: Tensor, empty_length: int) -> Shown:
    """Captions with their features [n * PER_CLASS, L, D], and those of the empty one [L, D]."""
    null = (empty.expand_as(text), torch.full_like(lengths, empty_length))
    return Shown([name[:COLUMN] for name in names], Condition((text, lengths), null))


class GeneratorPreview:
    """PNG of samples: the same noise for the same classes or prompts at every preview."""

    def __init__(
        self, objective: GeneratorObjective, tokenizer: StoredTokenizer, shown: Shown, precision: Precision
    ) -> None:
        self.objective, self.tokenizer, self.shown, self.precision = objective, tokenizer, shown, precision
        config = objective.config.sampler
        # A graph would be recorded for each preview, while other threads use the GPU
        self.sampler = replace(config, steps=min(config.steps, SAMPLER_STEPS), cuda_graph=False)

    def __call__(self) -> bytes:
        model, device = self.objective.ema.module, self.precision.device
        assert isinstance(model, Network)
        shape = (model.latent_channels, *model.latent_size)
        noise = torch.randn(len(self.shown.condition), *shape, generator=torch.Generator().manual_seed(0))
        with undisturbed(device, model, self.tokenizer), self.precision.autocast():
            latents = integrate(model, noise.to(device), self.shown.condition.to(device), self.sampler)
            images = self.tokenizer.decode(latents).clamp(-1, 1).cpu()
        rows = torch.stack(by_class(images, self.shown.names), dim=1)  # [per class, classes, 3, H, W]
        return _sheet(list(rows), ["Samples"] + [""] * (PER_CLASS - 1), {0: self.shown.names})


def _sheet(rows: list[Tensor], labels: list[str], headings: dict[int, list[str]] | None = None) -> bytes:
    """PNG, packed for speed: training waits."""
    buffer = io.BytesIO()
    image = sheet(rows, labels, max(1, SIDE // rows[0].shape[-1]), headings)
    image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()
