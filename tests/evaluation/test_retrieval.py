"""Caption retrieval and class agreement on features with a known answer, and by brute force."""

import itertools

import pytest
import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.evaluation import retrieval
from aligntok.evaluation.retrieval import (
    Pictures,
    fit_caption_map,
    measure_class_agreement,
    measure_retrieval,
    retrieval_accuracy,
)


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def names(n: int, offset: int = 0) -> list[str]:
    return [f"caption {i + offset}" for i in range(n)]


class Encoder:
    """Text features by a table."""

    def __init__(self, captions: list[str], features: Tensor) -> None:
        self.table = dict(zip(captions, features, strict=True))

    def __call__(self, captions: list[str]) -> Tensor:
        return torch.stack([self.table[caption] for caption in captions])


def brute_force(scores: Tensor, right: int, k: int) -> float:
    """Over all choices of k - 1 others: 1 / (number of the nearest) where the right one is among the nearest."""
    others = [i for i in range(len(scores)) if i != right]
    won = []
    for chosen in itertools.combinations(others, k - 1):
        best = max(scores[i] for i in (*chosen, right))
        nearest = [i for i in (*chosen, right) if scores[i] == best]
        won.append(1 / len(nearest) if right in nearest else 0.0)
    return sum(won) / len(won)


def test_the_closed_form_is_the_mean_over_all_draws():
    texts = torch.eye(7).double()
    predicted = torch.tensor([[3, 1, 3, 0, 4, 2, 3], [1] * 7, [0, 9, 1, 1, 2, 2, 2]]).double()
    for k in (2, 3, 7):
        for row, right in itertools.product(range(3), range(7)):
            found = retrieval_accuracy(predicted[row : row + 1], names(1, right), names(7), texts, k)
            assert found.accuracy == pytest.approx(brute_force(predicted[row], right, k), abs=1e-12)


def test_ties_alone_are_chance_and_equal_texts_count_once():
    found = retrieval_accuracy(torch.ones(4, 5), names(4), names(30), torch.ones(30, 5), 10)
    assert found.accuracy == pytest.approx(0.1) and found.error < 1e-9
    pool = [*names(12), "Caption  3", "CAPTION 3"]
    assert retrieval_accuracy(torch.ones(1, 5), ["caption 3"], pool, torch.ones(14, 5), 10).pool == 12


def test_the_map_is_the_ridge_regression_of_the_formula():
    x, t = normal(40, 6, 0) * 3 + 1, normal(40, 4, 1) + 2
    found = fit_caption_map(x, t, names(40), strengths=(2.5,))
    centred = (x - x.mean(0)) / x.std(0, correction=0)
    inverse = torch.linalg.inv(centred.T @ centred + 2.5 * torch.eye(6))
    torch.testing.assert_close(found.weight, (inverse @ centred.T @ (t - t.mean(0))).T)
    torch.testing.assert_close(found(x), centred @ found.weight.T)
    assert (found.strength, found.count) == (2.5, 40)


def test_the_strength_follows_the_noise():
    x, weight = normal(60, 40, 0), normal(40, 8, 1)
    clear = fit_caption_map(x, x @ weight, names(60))
    noisy = fit_caption_map(x, x @ weight + 60 * normal(60, 8, 2), names(60))
    assert clear.strength < noisy.strength and clear.cosine > noisy.cosine


def test_pictures_of_one_caption_are_never_on_both_sides():
    """Features that hold nothing but which caption it is: seen captions would be found, unseen ones cannot be."""
    captions = [name for name in names(20) for _ in range(5)]
    x = torch.eye(20).double().repeat_interleave(5, dim=0) + 1e-3 * normal(100, 20, 0)
    t = normal(20, 16, 1).repeat_interleave(5, dim=0)
    assert abs(fit_caption_map(x, t, captions).cosine) < 0.3


def sets(shuffled: bool = False) -> tuple[Pictures, Pictures, Pictures, Encoder]:
    captions, x = names(400), normal(400, 12, 0)
    texts = x @ normal(12, 12, 1)
    if shuffled:
        texts = texts[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    every = Pictures(x, captions)
    fitted, held, made = (every.subset(torch.arange(a, b)) for a, b in ((0, 200), (200, 300), (300, 400)))
    return fitted, held, made, Encoder(captions, texts)


def test_a_perfect_map_finds_every_caption_and_one_of_shuffled_captions_none():
    found = measure_retrieval(*sets(), k=10)
    assert list(found.values) == ["retrieval 1 of 10", "retrieval 1 of 10, real pictures", "retrieval 1 of 10, chance"]
    assert list(found.values.values()) == pytest.approx([1.0, 1.0, 0.1], abs=1e-3)
    assert "among 10 of 200 distinct" in found.protocol and "n=100 generated pictures (0 with" in found.protocol
    nothing = measure_retrieval(*sets(shuffled=True), k=10)
    for value, error in zip(nothing.values.values(), nothing.extra["errors"].tolist(), strict=False):
        assert abs(value - 0.1) < 4 * error


def test_noisy_pictures_stay_below_the_real_ones():
    fitted, held, made, encode = sets()
    blurred = Pictures(made.features + 2 * normal(100, 12, 5), made.captions)
    made_share, real_share, chance = measure_retrieval(fitted, held, blurred, encode).values.values()
    assert chance < made_share < 0.9 < real_share


def test_class_agreement():
    labels = torch.arange(90) % 3 + 4  # of any numbers
    x = normal(90, 6, 0) + 20 * torch.eye(6).double()[labels - 4]
    real, held = Pictures(x[:60], names(60), labels[:60]), Pictures(x[60:], names(30), labels[60:])
    wrong = Pictures(x[60:], names(30), torch.cat([labels[60:75], labels[75:].roll(1)]))
    found = measure_class_agreement(real, held, wrong)
    assert list(found.values.values()) == pytest.approx([0.5, 1.0, 1 / 3], abs=0.07)
    assert "3 classes; 30 generated, 30 real" in found.protocol
    unknown = Pictures(x[60:], names(30), torch.where(labels[60:] == 4, 99, labels[60:]))
    assert "3 classes; 20 generated" in measure_class_agreement(real, held, unknown).protocol
    assert measure_class_agreement(real, held, Pictures(x[60:], names(30))) is None
    one = Pictures(x[:60], names(60), torch.zeros(60, dtype=torch.long))
    assert measure_class_agreement(one, held, wrong) is None
    assert measure_class_agreement(real, held, Pictures(x[60:], names(30), torch.full((30,), 99))) is None


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Pictures(torch.ones(3), ["a"] * 3), r"expected features \[n, P\]"),
        (lambda: Pictures(torch.ones(2, 3), ["a"]), r"got \[2, 3\], 1 and None"),
        (lambda: Pictures(torch.full((1, 2), torch.nan), ["a"]), "not finite"),
        (lambda: fit_caption_map(torch.ones(3, 2), torch.ones(2, 2), names(3)), "text features"),
        (lambda: fit_caption_map(torch.ones(9, 2), torch.full((9, 2), torch.inf), names(9)), "not finite"),
        (lambda: fit_caption_map(torch.ones(9, 2), torch.ones(9, 2), ["a"] * 9), "1 distinct captions"),
        (lambda: retrieval_accuracy(torch.ones(1, 2), ["a"], ["a"], torch.ones(1, 2), 2), "2 candidates from 1"),
        (
            lambda: retrieval_accuracy(torch.ones(1, 2), ["c"], ["a", "b"], torch.ones(2, 2), 2),
            "not in the pool .*: 'c'",
        ),
        (lambda: retrieval_accuracy(torch.ones(1, 2), ["a"], ["a", "b"], torch.ones(2, 3), 2), r"got \[1, 2\]"),
    ],
)
def test_what_is_wrong_is_said(make, told):
    with pytest.raises(UserError, match=told):
        make()


def test_the_default_candidates_are_ten():
    assert retrieval.CANDIDATES == 10
