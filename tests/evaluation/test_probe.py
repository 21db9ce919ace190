"""Linear probe: parity with scikit-learn, the folds, the rule for small classes, speed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from aligntok.errors import UserError
from aligntok.evaluation import probe
from aligntok.evaluation.probe import fit_logistic, linear_probe, probe_latents


def clusters(n: int, d: int, classes: int, separation: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator) * separation
    scales = torch.rand(d, generator=generator) * 5 + 0.1  # features of very different size
    return (torch.randn(n, d, generator=generator) + centres[labels]) * scales, labels


def test_fit_matches_scikit_learn():
    features, labels = clusters(300, 20, 5, 0.4)
    features = torch.from_numpy(StandardScaler().fit_transform(features.double().numpy()))
    weight, bias = fit_logistic(features, labels, 5)
    theirs = LogisticRegression(C=1.0, tol=1e-9, max_iter=5000).fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(weight, theirs.coef_, atol=2e-4)
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-4)


def test_probe_matches_scikit_learn_fold_by_fold():
    features, labels = clusters(400, 30, 6, 0.3)
    result = linear_probe(features, labels, folds=4, seed=3)
    fold_of = probe._stratified_folds(labels, 4, 3).numpy()
    x, y = features.double().numpy(), labels.numpy()
    for fold, accuracy in enumerate(result.folds):
        train, test = fold_of != fold, fold_of == fold
        scaler = StandardScaler().fit(x[train])
        model = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(scaler.transform(x[train]), y[train])
        assert accuracy == pytest.approx(
            model.score(scaler.transform(x[test]), y[test]), abs=0.011
        )  # one sample of 100
    assert result.mean == pytest.approx(np.mean(result.folds))
    assert result.std == pytest.approx(np.std(result.folds, ddof=1))


def test_separable_and_random_labels():
    features, labels = clusters(500, 16, 4, 4.0)
    assert linear_probe(features, labels).mean > 0.99
    noise = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    assert linear_probe(noise, labels).mean == pytest.approx(0.25, abs=0.08)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(5, 23), min_size=2, max_size=6), seed=st.integers(0, 5))
def test_folds_are_stratified_and_even(counts, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    fold_of = probe._stratified_folds(labels, 5, seed)
    sizes = fold_of.bincount(minlength=5)
    assert sizes.max() - sizes.min() <= 1
    for label in range(len(counts)):
        per_fold = fold_of[labels == label].bincount(minlength=5)
        assert per_fold.max() - per_fold.min() <= 1


def test_small_classes_are_left_out_and_named():
    features, labels = clusters(200, 8, 3, 2.0)
    labels[labels == 1] = 7  # labels need not be consecutive
    few = torch.tensor([4, 4, 4])  # three members, five folds
    result = linear_probe(torch.cat([features, torch.randn(3, 8)]), torch.cat([labels, few]))
    assert result.left_out == (4,) and result.classes == (0, 2, 7) and result.samples == 200
    assert "too small to split: [4]" in result.protocol and "n=200" in result.protocol
    assert result == linear_probe(features, labels).__class__(
        **{**vars(linear_probe(features, labels)), "left_out": (4,)}
    )


def test_constant_features_do_no_harm():
    features, labels = clusters(200, 8, 3, 2.0)
    padded = torch.cat([features, torch.full((200, 2), 3.0)], dim=1)
    assert linear_probe(padded, labels).folds == linear_probe(features, labels).folds


def test_latents_pooled_and_flattened():
    """The class is in the position of a bright cell: pooling loses it, flattening keeps it."""
    labels = torch.arange(200) % 4
    latents = torch.zeros(200, 3, 2, 2)
    latents[torch.arange(200), 0, labels // 2, labels % 2] = 1.0
    latents += torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    pooled, flattened = probe_latents(latents, labels)
    assert (pooled.dimension, flattened.dimension) == (3, 12)
    assert flattened.mean > 0.99 and pooled.mean < 0.5


def test_converges_at_the_size_of_the_quickstart():
    """Within the iteration limit the gradient of the regularised loss is practically zero."""
    features, labels = clusters(1040, 384, 12, 0.15)
    features = ((features - features.mean(0)) / features.std(0)).double()
    weight, bias = fit_logistic(features, labels, 12)
    error = torch.softmax(features @ weight.T + bias, dim=1) - torch.nn.functional.one_hot(labels, 12)
    gradient = error.T @ features / len(features) + weight / len(features)
    assert gradient.abs().max() < 1e-5 and error.mean(0).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("features", "labels", "folds", "message"),
    [
        (torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), 5, "two classes of at least 5 members"),
        (torch.zeros(4, 2), torch.zeros(4), 2, "integer labels"),
        (torch.zeros(4, 2), torch.zeros(3, dtype=torch.long), 2, "expected features"),
        (torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), 1, "at least 2 folds"),
        (torch.full((4, 2), float("inf")), torch.tensor([0, 0, 1, 1]), 2, "not finite"),
    ],
)
def test_refusals(features, labels, folds, message):
    with pytest.raises(UserError, match=message):
        linear_probe(features, labels, folds)
    with pytest.raises(UserError, match="latents"):
        probe_latents(features, labels, folds)
