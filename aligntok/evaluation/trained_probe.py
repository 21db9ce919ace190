"""Linear probe for large sets: trained by minibatches on one set of images, judged on another.

    min over W, b of  mean cross_entropy(W BatchNorm(x) + b, y)

BatchNorm has no scale and shift of its own and only standardises. SGD with momentum 0.9, no weight decay, cosine
schedule to zero, 90 epochs (the recipe of MoCo and MAE for frozen features). Several learning rates are trained side by
side on the same batches; the one that is best on a tenth of the training images, which none of them saw, is judged on
the validation images, once. The exact protocol of AlignTok's table is not published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, prod
from pathlib import Path
from shutil import disk_usage

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.evaluation.checks import require_at_least

RATES = (0.01, 0.1, 1.0, 10.0)  # for a batch of 256: standardised features make the optimum lie within this range
_HELD_OUT = 10  # every tenth training image chooses the rate
_STEPS_PER_EPOCH = 8  # at least: smaller sets get smaller batches


@dataclass(frozen=True)
class TrainedProbe:
    """Accuracy (0 to 1) on the validation images, and how it came about."""

    accuracy: float
    rate: float  # chosen from RATES
    train_samples: int
    val_samples: int
    dimension: int
    classes: int
    epochs: int
    batch_size: int
    majority: float  # share of the largest class of the validation images
    seed: int

    @property
    def protocol(self) -> str:
        """What to print beside the number."""
        return (
            f"BatchNorm without affine part + linear on {self.dimension} features, SGD with momentum 0.9, "
            f"{self.epochs} epochs at batch {self.batch_size}, rate {self.rate:g} x batch / 256 of {list(RATES)} by a "
            f"tenth of the n={self.train_samples} training images, cosine; top-1 on n={self.val_samples} validation "
            f"images, {self.classes} classes, largest {self.majority:.3f}; centre crops, no mirroring; seed {self.seed}"
        )


class _Heads(nn.Module):
    """One linear layer per rate behind one BatchNorm."""

    def __init__(self, dimension: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dimension, affine=False, eps=1e-6)  # MAE's linear probe
        layers = [nn.Linear(dimension, classes) for _ in RATES]
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @property
    def device(self) -> torch.device:
        return next(self.layers.parameters()).device

    def forward(self, features: Tensor) -> list[Tensor]:
        features = self.norm(features)
        return [layer(features) for layer in self.layers]


def train_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    epochs: int = 90,
    batch_size: int = 1024,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> TrainedProbe:
    """Probe of (features [n, C], labels [n]), both sets with the same classes; features may lie in a mapped file.

    Raises:
        UserError: other shapes, one class only, too few training images, labels that training did not have, or what
            `check_recipe` refuses.
    """
    check_recipe(epochs, batch_size)
    features, labels = _checked(*train)
    _checked(*val)
    classes = int(labels.max()) + 1
    if val[0].shape[1] != features.shape[1] or int(val[1].max()) >= classes:
        raise UserError("the validation features or labels do not fit the training ones: give sets of the same classes")
    check_training_labels(labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = _Heads(features.shape[1], classes).to(device)
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=source)
    tuning, fitting = order[::_HELD_OUT].sort().values, order[torch.arange(len(order)) % _HELD_OUT != 0]
    batch = min(batch_size, len(fitting) // _STEPS_PER_EPOCH)
    _fit(heads, features, labels, fitting, epochs, batch, source, progress)
    chosen = int(torch.tensor(_accuracies(heads, features, labels, tuning)).argmax())
    everything = torch.arange(len(val[1]))
    return TrainedProbe(
        accuracy=_accuracies(heads, *val, everything)[chosen],
        rate=RATES[chosen],
        train_samples=len(labels),
        val_samples=len(val[1]),
        dimension=features.shape[1],
        classes=classes,
        epochs=epochs,
        batch_size=batch,
        majority=(val[1].bincount().max() / len(val[1])).item(),
        seed=seed,
    )


def check_recipe(epochs: int, batch_size: int) -> None:
    """UserError unless there is an epoch to train for, and a batch has the two images that BatchNorm needs."""
    require_at_least(1, epochs=epochs)
    require_at_least(2, batch_size=batch_size)


def check_training_labels(labels: Tensor) -> None:
    """UserError unless labels [n] are of two classes and many enough to choose the rate on a tenth of them."""
    classes = len(labels.unique())
    if classes < 2 or len(labels) < 2 * _HELD_OUT:
        raise UserError(
            f"a linear probe needs two classes and {2 * _HELD_OUT} training images, got {classes} and {len(labels)}: "
            "give --train a folder with a sub-folder for each class"
        )


def _checked(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or labels.shape != features.shape[:1] or labels.is_floating_point() or not len(labels):
        raise UserError(
            f"expected features [n, C] and integer labels [n], got {list(features.shape)} and {list(labels.shape)} of "
            f"{labels.dtype}"
        )
    return features, labels


def _fit(
    heads: _Heads,
    features: Tensor,
    labels: Tensor,
    fitting: Tensor,
    epochs: int,
    batch: int,
    source: torch.Generator,
    progress: Callable[[int, int], None] | None,
) -> None:
    groups = [
        {"params": layer.parameters(), "lr": rate * batch / 256}
        for rate, layer in zip(RATES, heads.layers, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    device, per_epoch = heads.device, len(fitting) // batch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + cos(pi * min(1.0, step / (epochs * per_epoch))))
    )
    heads.train()
    for epoch in range(epochs):
        shuffled = fitting[torch.randperm(len(fitting), generator=source)]
        for rows in shuffled[: per_epoch * batch].view(per_epoch, batch).sort(dim=1).values:  # in the file's order
            x, y = features[rows].to(device).float(), labels[rows].to(device)
            optimizer.zero_grad()
            torch.stack([F.cross_entropy(logits, y) for logits in heads(x)]).sum().backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress(epoch + 1, epochs)


@torch.no_grad()
def _accuracies(heads: _Heads, features: Tensor, labels: Tensor, rows: Tensor) -> list[float]:
    """Top-1 of every rate on the chosen rows; a rate that diverged scores what it predicts."""
    heads.eval()
    device, right = heads.device, torch.zeros(len(RATES), dtype=torch.float64)
    for part in rows.split(1024):
        x, y = features[part].to(device).float(), labels[part].to(device)
        right += torch.stack([(logits.argmax(1) == y).sum() for logits in heads(x)]).cpu()
    return (right / len(rows)).tolist()


class LatentTable:
    """Latents of a large set for probing: pooled ones in memory, whole ones as float16 in a file that is mapped.

    Used as a context manager, which removes the file. `capacity` is an upper bound of the number of latents.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self._pooled: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._whole: Tensor | None = None

    def __enter__(self) -> LatentTable:
        self._folder = tempfile.TemporaryDirectory(prefix="aligntok-probe-")
        return self

    def __exit__(self, *exception: object) -> None:
        self._whole = None
        self._folder.cleanup()

    def add(self, latents: Tensor, labels: Tensor) -> None:
        """Take in normalised latents [B, d, h, w] (or [B, d, n]) and labels [B]."""
        if self._whole is None:
            self._whole = self._open(prod(latents.shape[1:]))
        whole = latents.flatten(1).half()
        if not whole.isfinite().all():
            raise UserError("the latents are not finite, or too large for float16: this tokenizer cannot be probed")
        self._pooled.append(latents.float().flatten(2).mean(2))
        self._labels.append(labels)
        self._whole[self.count : self.count + len(latents)] = whole
        self.count += len(latents)

    def _open(self, dimension: int) -> Tensor:
        size, folder = self.capacity * dimension, Path(self._folder.name)
        if disk_usage(folder).free < 2 * size:
            raise UserError(
                f"whole latents of {self.capacity} images take {2 * size / 1e9:.1f} GB of temporary space, and "
                f"{folder.parent} has {disk_usage(folder).free / 1e9:.1f} GB: set TMPDIR to a larger disk"
            )
        mapped = torch.from_file(str(folder / "latents"), shared=True, size=size, dtype=torch.float16)
        return mapped.view(self.capacity, dimension)

    @property
    def pooled(self) -> Tensor:
        return torch.cat(self._pooled)

    @property
    def labels(self) -> Tensor:
        return torch.cat(self._labels)

    @property
    def whole(self) -> Tensor:
        assert self._whole is not None
        return self._whole[: self.count]
