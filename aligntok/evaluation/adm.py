"""ADM's protocol for generated images, as functions of features: files, FID and sFID moments, IS, precision and recall.

    IS        = mean over splits of exp(mean_i sum_c p_ic (log p_ic - log mean_i p_ic))
    precision = share of samples within the ball of any reference point; recall = the same with the sets exchanged;
                a point's ball reaches to its k-th nearest neighbour in its own set

Samples travel as .npz with `arr_0` uint8 [n, H, W, 3]; a reference batch adds mu, sigma (pooled features) and mu_s,
sigma_s (spatial ones): aligntok.evaluation.reference. Source: guided-diffusion evaluations/evaluator.py and README.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.evaluation.npz import damage_of, member, opened
from aligntok.runtime.files import unfinished_file

NEIGHBOURS = 3  # k of precision and recall
SPLIT = 5_000  # samples per split of the Inception score
SPATIAL_CHANNELS = 7  # of the Mixed_6 block's first convolution, at 17 x 17: 2,023 features


@dataclass(frozen=True)
class Moments:
    """A Gaussian by its mean [d] and covariance [d, d], float64; what `frechet_distance` needs of one."""

    mean: Tensor
    cov: Tensor

    @property
    def dimension(self) -> int:
        return len(self.mean)


def write_samples(path: str | Path, images: Tensor) -> None:
    """Images uint8 [n, 3, H, W] -> .npz with arr_0 [n, H, W, 3], atomically."""
    write_sample_batches(path, [images], len(images))


def write_sample_batches(path: str | Path, batches: Iterable[Tensor], count: int) -> None:
    """Batches uint8 [B, 3, H, W] of together `count` images -> .npz, atomically; memory holds one batch.

    Raises:
        UserError: other values, images of different sizes, or another number of them.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, 1))  # made before the file's folder is
    written, shape = 0, None
    with unfinished_file(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for images in itertools.chain(first, batches):
                if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                    raise UserError(f"expected uint8 images [n, 3, H, W], got {images.dtype} {list(images.shape)}")
                if shape is None:
                    shape = images.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, shape[1], shape[2], 3)}
                    np.lib.format.write_array_header_1_0(file, header)
                if images.shape[1:] != shape:
                    raise UserError(f"images of {list(shape)} and of {list(images.shape[1:])} do not fit into one file")
                file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                written += len(images)
            if written != count or shape is None:
                raise UserError(f"{written} images were made for {path}, which was to hold {count}")


def sample_shape(path: str | Path) -> tuple[int, int, int]:
    """(images, height, width) of a file of samples; its images are not read."""
    with opened(path) as archive, member(archive, "arr_0", path) as (_, shape, dtype):
        check_samples(path, shape, dtype)
        return shape[0], shape[1], shape[2]


def read_samples(path: str | Path, batch_size: int = 64) -> Iterator[Tensor]:
    """Batches uint8 [B, 3, H, W] of arr_0; memory holds one batch, whatever the number of samples."""
    with opened(path) as archive, member(archive, "arr_0", path) as (file, shape, dtype):
        check_samples(path, shape, dtype)
        size = int(np.prod(shape[1:]))
        for start in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - start)
            with damage_of(path, "arr_0"):
                data = file.read(count * size)
            if len(data) != count * size:
                raise UserError(f"{path} ends after {start + len(data) // size} of its {shape[0]} samples")
            images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *shape[1:])
            yield images.permute(0, 3, 1, 2).contiguous()


def refuse_as_originals(path: str | Path) -> None:
    """UserError where `path` is an .npz: rFID compares reconstructions with the images that they are made from."""
    if Path(path).suffix == ".npz":
        raise UserError(
            f"{path} is a file of samples or of moments, which stands for generated images' training set; "
            "reconstruction metrics need the validation images themselves: give their folder or .tar"
        )


def spatial_features(maps: Tensor) -> Tensor:
    """Feature maps [B, C, h, w] -> [B, h * w * 7] in ADM's order: rows, columns, the first seven channels."""
    if maps.ndim != 4 or maps.shape[1] < SPATIAL_CHANNELS:
        raise UserError(f"expected maps [B, C, h, w] with C >= {SPATIAL_CHANNELS}, got {list(maps.shape)}")
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


class InceptionScore:
    """Inception score of class logits that arrive in batches [n, classes], float64, one split in memory as two sums."""

    def __init__(self, split: int = SPLIT) -> None:
        self.split, self.count = split, 0
        self._scores: list[float] = []
        self._probabilities: Tensor | None = None  # sum over the split of p [classes]
        self._negative_entropy = 0.0  # sum over the split of sum_c p log p
        self._seen = 0

    def add(self, logits: Tensor) -> None:
        if logits.ndim != 2 or not logits.isfinite().all():
            raise UserError(f"expected finite logits [n, classes], got {list(logits.shape)}")
        while len(logits):
            room = self.split - self._seen
            part, logits = logits[:room], logits[room:]
            log_p = part.detach().double().cpu().log_softmax(dim=1)
            p = log_p.exp()
            summed = p.sum(0)
            self._probabilities = summed if self._probabilities is None else self._probabilities + summed
            self._negative_entropy += float((p * log_p).sum())
            self._seen, self.count = self._seen + len(part), self.count + len(part)
            if self._seen == self.split:
                self._close()

    def _close(self) -> None:
        self._scores.append(self._score())
        self._probabilities, self._negative_entropy, self._seen = None, 0.0, 0

    def _score(self) -> float:
        assert self._probabilities is not None  # the split has samples
        marginal = self._probabilities / self._seen
        return float(np.exp(self._negative_entropy / self._seen - float(torch.xlogy(marginal, marginal).sum())))

    def compute(self) -> float:
        """Mean over the splits; the last one counts like the others even if it is not full, as in ADM's code."""
        scores = self._scores + ([self._score()] if self._seen else [])
        if not scores:
            raise UserError("no logits were added: an Inception score needs at least one sample")
        return float(np.mean(scores))


def precision_recall(
    reference: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS, block: int = 1000
) -> tuple[float, float]:
    """(precision, recall) of samples [m, d] against a reference [n, d] (Kynkaanniemi et al. 2019).

    Raises:
        UserError: other shapes, or a set with no k-th neighbour.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise UserError(f"expected features [n, d] and [m, d], got {list(reference.shape)} and {list(samples.shape)}")
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbours:
            raise UserError(f"{len(features)} {name} have no neighbour number {neighbours}: give more")
    precision = _share_within(samples, reference, radii(reference, neighbours, block), block)
    return precision, _share_within(reference, samples, radii(samples, neighbours, block), block)


def radii(features: Tensor, neighbours: int = NEIGHBOURS, block: int = 1000) -> Tensor:
    """Distance [n] of each point to its k-th nearest neighbour among the others."""
    found = [torch.cdist(part, features).kthvalue(neighbours + 1).values for part in features.split(block)]
    return torch.cat(found)


def _share_within(points: Tensor, centres: Tensor, reach: Tensor, block: int) -> float:
    inside = [(torch.cdist(part, centres) <= reach).any(dim=1) for part in points.split(block)]
    return float(torch.cat(inside).cpu().double().mean())


def check_samples(path: str | Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """UserError unless these are shape and dtype of samples."""
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise UserError(f"{path}: arr_0 is {dtype} {list(shape)}, expected uint8 [n, H, W, 3]")
