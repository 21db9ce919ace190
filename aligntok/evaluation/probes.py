"""The two probes of a tokenizer's latents on image sets, and the alignment of its latents with an encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from aligntok.config import EncoderConfig
from aligntok.data.images import load_center_crops, open_images
from aligntok.data.loading import report_skipped
from aligntok.errors import UserError
from aligntok.evaluation.alignment import NEIGHBOURS, check_neighbours, cknna
from aligntok.evaluation.crops import crops_with_bar
from aligntok.evaluation.tokenizer import Measured, encode_all, encoder_probe, evaluate_probe, pooled_tokens
from aligntok.evaluation.trained_probe import LatentTable, check_training_labels, train_probe
from aligntok.models.encoder import Encoder
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime.devices import Precision
from aligntok.training.monitoring.telemetry import Telemetry

SMALL = 20_000  # images that a cross-validated probe keeps in memory: 3.9 GB at 256 px


class Alignment:
    """Pooled latents and pooled features of an encoder for the first so many images."""

    def __init__(
        self, tokenizer: StoredTokenizer, name: str | None, weights: str, limit: int, k: int, precision: Precision
    ) -> None:
        self.limit, self.k, self.precision = limit, k, precision
        self._latents: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._count = 0
        own = getattr(tokenizer, "encoder", None)
        if limit and name is not None:
            config = EncoderConfig(name=name, weights=weights, downsample=tokenizer.downsample)
            self.encoder: Encoder | None = Encoder(config).to(precision.device).eval()
            self.of = f"{name}, weights: {self.encoder.source}"
        else:
            self.encoder = own if limit and isinstance(own, Encoder) else None
            self.of = "the tokenizer's own encoder, as it is now"

    def expect(self, images: int) -> None:
        """UserError unless a set of so many images is enough; before any is encoded."""
        if self.encoder is not None:
            check_neighbours(self.k, min(self.limit, images))

    def add(self, images: Tensor, latents: Tensor) -> None:
        """Take in uint8 images [B, 3, H, W] and their latents [B, d, h, w], as long as there is room."""
        room = self.limit - self._count
        if self.encoder is None or room <= 0:
            return
        self._tokens.append(pooled_tokens(self.encoder, images[:room], self.precision))
        self._latents.append(latents[:room].float().flatten(2).mean(2))
        self._count += len(self._tokens[-1])

    def measure(self) -> Measured | None:
        if not self._count:
            return None
        return measure_alignment(torch.cat(self._latents), torch.cat(self._tokens), self.of, self.k)


def measure_alignment(latents: Tensor, tokens: Tensor, of: str, k: int = NEIGHBOURS) -> Measured:
    """CKNNA of pooled normalised latents [n, d] and pooled tokens [n, C]; `of` names the tokens' encoder."""
    protocol = (
        f"CKNNA with k={k} and unbiased HSIC (Huh et al. 2024) of pooled normalised latents and pooled tokens of "
        f"{of}; rows scaled to length 1; n={len(latents)}"
    )
    return Measured({"CKNNA": cknna(latents, tokens, k)}, protocol)


def trained_probes(
    tokenizer: StoredTokenizer,
    paths: tuple[str, str],
    size: int,
    recipe: tuple[int, int, int],
    alignment: Alignment,
    precision: Precision,
    telemetry: Telemetry,
) -> dict[str, Measured]:
    train, val = (open_images(path, say=telemetry.say) for path in paths)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:3]
        raise UserError(f"--train and --val must have the same classes (sub-folders); not in both: {', '.join(odd)}")
    check_training_labels(train.labels)
    alignment.expect(len(val))
    with LatentTable(len(train)) as fitted, LatentTable(len(val)) as judged:
        for images, table in ((train, fitted), (val, judged)):
            title = "latents, training" if images is train else "latents, validation"
            with crops_with_bar(images, size, title, telemetry) as batches:
                for pixels, labels in batches:
                    latents = encode_all(tokenizer, pixels, precision)
                    table.add(latents, labels)
                    if images is val:
                        alignment.add(pixels, latents)
        found = {}
        for name, kind in (("pooled", "pooled"), ("flattened", "whole")):
            with telemetry.bar(f"probe, {name}") as update:
                one, other = ((getattr(table, kind), table.labels) for table in (fitted, judged))
                result = train_probe(one, other, *recipe, precision.device, update)
            found[f"probe, {name} latents"] = Measured({"top-1": result.accuracy}, result.protocol)
    return found


def cross_validated_probes(
    tokenizer: StoredTokenizer,
    path: str,
    size: int,
    seed: int,
    alignment: Alignment,
    precision: Precision,
    telemetry: Telemetry,
) -> dict[str, Measured]:
    images = open_images(path, say=telemetry.say)
    alignment.expect(len(images))
    if len(images) > SMALL:
        raise UserError(
            f"{path} has {len(images)} images, and the cross-validated probe keeps all of them in memory (up to "
            f"{SMALL}): give --train and --val for the probe of large sets"
        )
    with telemetry.bar("reading images") as update:
        pixels, labels = load_center_crops(images, size, update)
    report_skipped(images, telemetry.say)
    latents = encode_all(tokenizer, pixels, precision)
    alignment.add(pixels, latents)
    probes = {
        "probe of latents": evaluate_probe(latents, labels, seed),
        "probe of encoder": encoder_probe(tokenizer, pixels, labels, precision, seed),
    }
    if probes["probe of latents"] is None:
        telemetry.say(f"no linear probe: {path} has one class; a class per sub-folder is needed")
    return {name: measured for name, measured in probes.items() if measured is not None}
