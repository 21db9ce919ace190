"""Generated pictures beside real ones with captions: retrieval of the caption, and agreement with its class.

Image features are EfficientNet-Lite0's, text features those of a caption's tokens, averaged; what is made of them:
aligntok.evaluation.retrieval. Of several captions of a real picture the first is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aligntok.data.captions import read_captions
from aligntok.data.geometry import to_unit_range
from aligntok.data.images import ImageSet, open_images
from aligntok.errors import UserError
from aligntok.evaluation.adm import refuse_as_originals
from aligntok.evaluation.crops import crops_with_bar
from aligntok.evaluation.features import EfficientNetLite0
from aligntok.evaluation.prompted import PromptedPictures, refuse_unreadable
from aligntok.evaluation.retrieval import Pictures, measure_class_agreement, measure_retrieval, same_text
from aligntok.evaluation.tokenizer import Measured
from aligntok.models.text_encoder import TextEncoder
from aligntok.runtime.devices import Precision
from aligntok.training.monitoring.telemetry import Telemetry

_TEXTS = 64  # captions encoded at once
UNKNOWN = -1  # class of a picture whose caption says none


@dataclass(frozen=True)
class RealCaptioned:
    """Real pictures that have captions, the first of each, and those that the probes do not see."""

    name: str
    fitted: ImageSet
    held_out: ImageSet
    captions: dict[str, str]  # by the picture's name

    def classes_of(self) -> dict[str, int]:
        """Class of every caption that only pictures of one class have."""
        found: dict[str, set[int]] = {}
        for entry in (*self.fitted.entries, *self.held_out.entries):
            found.setdefault(same_text(self.captions[entry.name]), set()).add(entry.label)
        return {caption: min(labels) for caption, labels in found.items() if len(labels) == 1}


def open_real(real: str, captions: str | None, held_out: float, telemetry: Telemetry) -> RealCaptioned:
    """The pictures of --real with their captions, split by ImageSet.split."""
    refuse_as_originals(real)
    images = open_images(real, say=telemetry.say)
    found = read_captions(images, captions, say=telemetry.say)
    chosen = images.subset(found.pictures)
    texts = [found.texts[number][0] for number in found.pictures]
    if not 0 < held_out < 1:
        raise UserError(f"--held_out is {held_out:g}, expected a share between 0 and 1, such as 0.25")
    fitted, kept = chosen.split(held_out)
    if not len(kept):
        raise UserError(f"--held_out {held_out:g} of {len(chosen)} pictures is none: give more, or a larger share")
    named = dict(zip((entry.name for entry in chosen.entries), texts, strict=True))
    return RealCaptioned(images.name, fitted, kept, named)


def measure_probes(
    drawn: PromptedPictures,
    real: RealCaptioned,
    side: int,
    encoder: TextEncoder,
    candidates: int,
    seed: int,
    precision: Precision,
    telemetry: Telemetry,
) -> dict[str, Measured]:
    """Caption retrieval, and class agreement where `real` has classes; see aligntok.evaluation.retrieval."""
    extractor = EfficientNetLite0().to(precision.device)

    def features(images: ImageSet, title: str) -> tuple[Tensor, list[str], Tensor]:
        """[n, 1280], names and labels of the readable pictures."""
        with crops_with_bar(images, side, title, telemetry) as batches:
            pairs = [(extractor(to_unit_range(pixels)).cpu(), labels) for pixels, labels in batches]
        names = [entry.name for entry in images.entries if entry.name not in images.skipped]
        rows, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        return rows, names, labels

    def seen(images: ImageSet, title: str) -> Pictures:
        rows, names, labels = features(images, title)
        return Pictures(rows, [real.captions[name] for name in names], labels)

    fitted, held_out = seen(real.fitted, "real pictures"), seen(real.held_out, "real pictures, held out")
    images = drawn.images()
    rows, _, _ = features(images, "pictures")
    refuse_unreadable(images)
    made = Pictures(rows, drawn.texts, classes_asked(drawn, real))
    with telemetry.bar("encoding captions") as update:

        def encode(captions: list[str]) -> Tensor:
            return mean_text_features(encoder, captions, update)

        words = f"captions by {encoder.name}, mean over tokens"
        found = {"captions": measure_retrieval(fitted, held_out, made, encode, candidates, seed, words)}
    if len(real.fitted.classes) > 1:
        agreed = measure_class_agreement(fitted, held_out, made)
        if agreed is None:
            telemetry.say('no class agreement: no caption of the pictures says a class of --real, nor does a "class"')
        else:
            found["classes"] = agreed
    for measured in found.values():
        measured.protocol += f"; {extractor.protocol}; {side} px; real pictures: {real.name}; {drawn.prompts.protocol}"
    return found


def classes_asked(drawn: PromptedPictures, real: RealCaptioned) -> Tensor:
    """Class [n] of each picture: its record's "class", or that of the real pictures with its caption, or UNKNOWN."""
    numbers, by_caption = {name: i for i, name in enumerate(real.fitted.classes)}, real.classes_of()
    found = []
    for record, files in zip(drawn.prompts.records, drawn.files, strict=True):
        named = record.get("class")
        label = numbers.get(named) if isinstance(named, str) else by_caption.get(same_text(record["prompt"]))
        found += [UNKNOWN if label is None else label] * len(files)
    return torch.tensor(found)


def mean_text_features(
    encoder: TextEncoder, captions: list[str], progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Captions -> [n, D], the mean over each one's tokens, float32 on the CPU."""
    found = []
    for start in range(0, len(captions), _TEXTS):
        states, lengths = encoder.encode(captions[start : start + _TEXTS])
        found.append((states.sum(1) / lengths[:, None]).float().cpu())  # zero behind a caption's own tokens
        if progress is not None:
            progress(min(start + _TEXTS, len(captions)), len(captions))
    return torch.cat(found)
