"""Linear probe: what a linear classifier reads out of frozen features, cross-validated.

    min over W, b of  sum_i cross_entropy(W x_i + b, y_i) + |W|^2 / (2 C),   x standardised on the training
    folds

Stratified folds, multinomial logistic regression by L-BFGS on the full batch, accuracy on the held-out
fold. For latents two numbers: average-pooled over the grid, which is the reading that fits the values
AlignTok reports, and flattened.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import UserError

FOLDS = 5
_REGULARISATION = 1.0  # C above; scikit-learn's default, not tuned
_ITERATIONS = 200  # of L-BFGS; well-conditioned standardised features need 30 to 100


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy (0 to 1) over folds: mean, sample standard deviation, and every fold."""

    mean: float
    std: float
    folds: tuple[float, ...]
    samples: int
    dimension: int
    classes: tuple[int, ...]  # labels that took part
    left_out: tuple[int, ...]  # labels with fewer members than folds
    majority: float  # share of the largest class: what a constant answer scores
    seed: int

    @property
    def protocol(self) -> str:
        """What to print beside the number."""
        text = (
            f"logistic regression (C={_REGULARISATION:g}) on {self.dimension} standardised features, "
            f"n={self.samples}, {len(self.classes)} classes, {len(self.folds)} stratified folds, "
            f"seed {self.seed}; largest class {self.majority:.3f}"
        )
        return text + (f"; classes too small to split: {list(self.left_out)}" if self.left_out else "")


def can_be_probed(labels: Tensor, folds: int = FOLDS) -> bool:
    """Whether `linear_probe` has two classes of labels [n] with a member for each fold."""
    return int((labels.unique(return_counts=True)[1] >= folds).sum()) > 1


def linear_probe(features: Tensor, labels: Tensor, folds: int = FOLDS, seed: int = 0) -> ProbeResult:
    """Cross-validated accuracy of a linear classifier on features [n, C] with integer labels [n].

    A class with fewer members than folds cannot be in every test fold: it is left out and named in the
    result. UserError if fewer than two classes remain, on other shapes, or on features that are not finite.
    """
    features, labels = _checked(features, labels, folds)
    values, counts = labels.unique(return_counts=True)
    kept = values[counts >= folds]
    if not can_be_probed(labels, folds):
        raise UserError(
            f"a linear probe with {folds} folds needs two classes of at least {folds} members each; "
            f"the classes have {counts.tolist()} members"
        )
    chosen = torch.isin(labels, kept)
    features, labels = features[chosen], torch.searchsorted(kept, labels[chosen])
    fold_of = _stratified_folds(labels, folds, seed)
    scores = [_score_fold(features, labels, fold_of == fold, len(kept)) for fold in range(folds)]
    return ProbeResult(
        mean=statistics.fmean(scores),
        std=statistics.stdev(scores),
        folds=tuple(scores),
        samples=len(labels),
        dimension=features.shape[1],
        classes=tuple(kept.tolist()),
        left_out=tuple(values[counts < folds].tolist()),
        majority=(labels.bincount().max() / len(labels)).item(),
        seed=seed,
    )


def probe_latents(
    latents: Tensor, labels: Tensor, folds: int = FOLDS, seed: int = 0
) -> tuple[ProbeResult, ProbeResult]:
    """(pooled, flattened) probes of latents [n, d, h, w], which should be normalised as `encode` returns
    them."""
    if latents.ndim != 4:
        raise UserError(f"expected latents [n, d, h, w], got {list(latents.shape)}")
    pooled = linear_probe(latents.float().mean(dim=(2, 3)), labels, folds, seed)
    return pooled, linear_probe(latents.flatten(1), labels, folds, seed)


def _checked(features: Tensor, labels: Tensor, folds: int) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or labels.shape != features.shape[:1] or labels.is_floating_point():
        raise UserError(
            f"expected features [n, C] and integer labels [n], got {list(features.shape)} and "
            f"{list(labels.shape)} of {labels.dtype}"
        )
    if folds < 2:
        raise UserError(f"cross-validation needs at least 2 folds, got {folds}")
    if not features.isfinite().all():
        raise UserError("the features hold values that are not finite")
    return features.detach().double().cpu(), labels.detach().long().cpu()


def _stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Fold [n] of every sample: each class is shuffled and dealt round, the next class going on where it
    ended."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    fold_of = torch.empty_like(labels)
    fold_of[by_class] = torch.arange(len(labels)) % folds
    return fold_of


def _score_fold(features: Tensor, labels: Tensor, held_out: Tensor, classes: int) -> float:
    predict = train_classifier(features[~held_out], labels[~held_out], classes)
    return (predict(features[held_out]) == labels[held_out]).double().mean().item()


def train_classifier(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Features [n, C] -> labels [n], by the module's formula on standardised features, fitted in their precision."""
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-12, std, 1.0)  # a constant feature stays zero
    weight, bias = fit_logistic((features - mean) / std, labels, classes)
    return lambda others: (((others - mean) / std) @ weight.T + bias).argmax(1)


def fit_logistic(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weight [K, C] and bias [K] minimising the module's formula on features [n, C], in their precision."""
    weight = torch.zeros(classes, features.shape[1], dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )
    penalty = 0.5 / (_REGULARISATION * len(features))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
