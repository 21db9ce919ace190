"""Published scores of pictures and their prompts, by the networks that they are defined with.

    CLIP score x100    max(100 mean_i cos(E(picture_i), E(prompt_i)), 0)                          Hessel et al. 2021
    PickScore          mean_i exp(logit_scale) cos; beside it the cosine alone                     Kirstain et al. 2023
    HPSv2.x x100       100 mean_i cos, of ViT-H-14 tuned on preferences (aligntok.evaluation.hps)  Wu et al. 2023
    ImageReward        mean_i (MLP(BLIP_i) - 0.16717) / 1.03334 (aligntok.evaluation.image_reward) Xu et al. 2023

The CLIP score is torchmetrics': of the mean, not of each picture, the negative part is cut off. A prompt longer than
the network's text is cut and keeps its end token, as transformers cuts; torchmetrics drops the end token then.

Weights are never looked for: each score is there only if its weights are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aligntok.errors import UserError
from aligntok.evaluation.hps import HumanPreferenceScore, refuse_one_for_both
from aligntok.evaluation.image_reward import ImageReward
from aligntok.evaluation.prompted import PromptedPictures
from aligntok.evaluation.scorer_weights import Place, from_pretrained, place_of, told_pretrained
from aligntok.evaluation.tokenizer import Measured

BATCH = 32


class TextScorer(Protocol):
    """A network that gives numbers for pairs of a picture and a prompt."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers are called, scale included."""

    @property
    def floor(self) -> float | None:
        """Mean below which the first one is reported as this; None = no such bound."""

    @property
    def cut(self) -> int:
        """Pictures so far whose prompt was longer than the network's text."""

    @property
    def protocol(self) -> str:
        """Model, revision or hash, formula, resize."""

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """RGB pictures and as many prompts [n] -> [n, len(names)] float64 on the CPU."""


def measure_scores(
    pictures: PromptedPictures, scorers: Sequence[TextScorer], progress: Callable[[int, int], None] | None = None
) -> dict[str, Measured]:
    """Means over all pictures, each under its name with the protocol and the standard error over prompts.

    Pictures are read once for all scorers; memory holds one batch.
    """
    found: list[list[Tensor]] = [[] for _ in scorers]
    done = 0
    for images, prompts in pictures.batches(BATCH):
        for scorer, values in zip(scorers, found, strict=True):
            values.append(scorer(images, prompts))
        done += len(images)
        if progress is not None:
            progress(done, len(pictures))
    counts = [len(files) for files in pictures.files]
    return {
        scorer.names[0]: _summed_up(scorer, torch.cat(values), counts, pictures.prompts.protocol)
        for scorer, values in zip(scorers, found, strict=True)
    }


def _summed_up(scorer: TextScorer, values: Tensor, counts: list[int], prompts: str) -> Measured:
    if not values.isfinite().all():
        raise UserError(
            f"{scorer.names[0]} of {int((~values.isfinite()).any(1).sum())} pictures is not finite: look at them"
        )
    mean = values.mean(0)
    by_prompt = torch.stack([part.mean(0) for part in values.split(counts)])
    errors = by_prompt.std(0) / len(counts) ** 0.5 if len(counts) > 1 else torch.full_like(mean, torch.nan)
    numbers = dict(zip(scorer.names, mean.tolist(), strict=True))
    if scorer.floor is not None:
        numbers[scorer.names[0]] = max(numbers[scorer.names[0]], scorer.floor)
    told = ", ".join(f"{error:.3g}" for error in errors.tolist())
    protocol = f"{scorer.protocol}; {prompts}; mean over {len(values)} pictures, standard error over prompts {told}"
    protocol += f"; {scorer.cut} of them with prompts that were cut to the network's length" if scorer.cut else ""
    return Measured(numbers, protocol, {"scores": values})


@dataclass(frozen=True)
class Weights:
    """What the published scores are taken with, as given on the command line."""

    clip: str | None = None
    hpsv2: str | None = None
    hpsv2_1: str | None = None
    pickscore: str | None = None
    pickscore_processor: str | None = None
    image_reward: str | None = None
    image_reward_tokenizer: str = "bert-base-uncased"


def open_scorers(weights: Weights, device: torch.device, say: Callable[[str], None]) -> list[TextScorer]:
    """The scores whose weights are given; of the others it is said what they lack.

    Raises:
        UserError: weights that cannot be had, or one file for both versions of HPSv2.
    """
    found: list[TextScorer] = []
    absent = []
    if weights.clip is not None:
        found.append(ClipScore(weights.clip, device))
    else:
        absent.append("CLIP score (--clip, openai/clip-vit-large-patch14 on the hub)")
    preferences = []
    if weights.hpsv2 is not None:
        preferences.append(HumanPreferenceScore("2.0", weights.hpsv2, device))
    else:
        absent.append("HPSv2.0 (--hpsv2, xswu/HPSv2)")
    if weights.hpsv2_1 is not None:
        preferences.append(HumanPreferenceScore("2.1", weights.hpsv2_1, device))
    else:
        absent.append("HPSv2.1 (--hpsv2_1, xswu/HPSv2)")
    if len(preferences) == 2:
        refuse_one_for_both(*preferences)
    found += preferences
    if weights.pickscore is not None:
        found.append(PickScore(weights.pickscore, weights.pickscore_processor, device))
    else:
        absent.append("PickScore (--pickscore, yuvalkirstain/PickScore_v1)")
    if weights.image_reward is not None:
        found.append(ImageReward(weights.image_reward, weights.image_reward_tokenizer, device))
    else:
        absent.append("ImageReward (--image_reward, THUDM/ImageReward)")
    if absent:
        say(f"not measured, for no weights were given and no package carries them: {', '.join(absent)}")
    return found


class ClipCosines:
    """Cosines of a CLIPModel of transformers.

    Args:
        option: names the weights in messages.
        place: of the model.
        processor: of its preprocessing and tokenizer, where the model's folder has none; None = there.
        device: to compute on, in float32.
    """

    def __init__(self, option: str, place: Place, processor: Place | None, device: torch.device) -> None:
        self.option, self.device, self.cut = option, device, 0
        self.model: Any = from_pretrained(option, place, "CLIPModel").float().to(device).eval()
        self.processor: Any = from_pretrained(option, processor or place, "CLIPProcessor")
        self.length: int = self.model.config.text_config.max_position_embeddings
        self.told = told_pretrained(place, self.model) + (f", processor {processor.name}" if processor else "")

    @property
    def scale(self) -> float:
        """exp(logit_scale)."""
        return float(self.model.logit_scale.detach().double().exp())

    @property
    def protocol(self) -> str:
        return f"{self.told}; {_resize(self.processor.image_processor)}; at most {self.length} text tokens; float32"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """RGB pictures and as many prompts [n] -> cosines [n], float64 on the CPU."""
        images = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        tokenizer = self.processor.tokenizer
        self.cut += sum(len(ids) > self.length for ids in tokenizer(list(prompts), verbose=False)["input_ids"])
        texts = tokenizer(list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        seen = _pooled(self.model.get_image_features(pixel_values=images["pixel_values"].to(self.device)))
        read = _pooled(
            self.model.get_text_features(
                input_ids=texts["input_ids"].to(self.device), attention_mask=texts["attention_mask"].to(self.device)
            )
        )
        return F.cosine_similarity(seen.double(), read.double()).cpu()


class ClipScore:
    """CLIP score x100 of a CLIPModel, openai/clip-vit-large-patch14 in most publications."""

    names, floor = ("CLIP score x100",), 0.0

    def __init__(self, weights: str, device: torch.device) -> None:
        self.cosines = ClipCosines("clip", place_of("clip", weights), None, device)

    @property
    def cut(self) -> int:
        return self.cosines.cut

    @property
    def protocol(self) -> str:
        return f"CLIP score, 100 cos, the mean cut off at 0 as in torchmetrics: {self.cosines.protocol}"

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return 100 * self.cosines(pictures, prompts)[:, None]


class PickScore:
    """PickScore of a CLIPModel, yuvalkirstain/PickScore_v1; its processor is CLIP-ViT-H-14-laion2B-s32B-b79K's."""

    names, floor = ("PickScore", "PickScore cosine"), None

    def __init__(self, weights: str, processor: str | None, device: torch.device) -> None:
        other = None if processor is None else place_of("pickscore_processor", processor)
        self.cosines = ClipCosines("pickscore", place_of("pickscore", weights), other, device)

    @property
    def cut(self) -> int:
        return self.cosines.cut

    @property
    def protocol(self) -> str:
        return (
            f"PickScore, exp(logit_scale) cos with exp(logit_scale) = {self.cosines.scale:.4g}: {self.cosines.protocol}"
        )

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        found = self.cosines(pictures, prompts)
        return torch.stack([self.cosines.scale * found, found], dim=1)


def _pooled(found: Any) -> Tensor:
    """Embeddings [n, D]: what get_*_features returns, or holds from transformers 5 on."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _resize(processor: Any) -> str:
    """A CLIP image processor's resize and crop in words."""
    size = dict(processor.size)
    to = f"shortest side to {size['shortest_edge']}" if "shortest_edge" in size else f"to {size}"
    resample = Image.Resampling(processor.resample).name.lower()
    crop = f", centre crop {dict(processor.crop_size)['height']} px" if processor.do_center_crop else ""
    return f"{to} px ({resample}){crop}"
