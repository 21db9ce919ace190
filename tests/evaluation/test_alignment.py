"""CKNNA: the definition written out with whole matrices, and known answers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntok.errors import UserError
from aligntok.evaluation import alignment
from aligntok.evaluation.alignment import cknna


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic_with_matrices(k: torch.Tensor, m: torch.Tensor) -> float:
    """Song et al. 2012, equation 5: tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'K L 1 / (n-2), over n (n-3)."""
    n, ones = len(k), torch.ones(len(k), dtype=k.dtype)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    value = (k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return float(value - 2 * (ones @ k @ m @ ones) / (n - 2)) / (n * (n - 3))


def by_definition(a: torch.Tensor, b: torch.Tensor, k: int) -> float:
    kernels, masks = [], []
    for features in (a, b):
        features = F.normalize(features, dim=1)
        kernel = features @ features.T
        mask = torch.zeros_like(kernel)
        for row in range(len(kernel)):
            others = [column for column in range(len(kernel)) if column != row]
            nearest = sorted(others, key=lambda column: -kernel[row, column])[:k]
            mask[row, nearest] = 1
        kernels.append(kernel)
        masks.append(mask)

    def alignment_of(i: int, j: int) -> float:
        both = masks[i] * masks[j]
        return hsic_with_matrices(both * kernels[i], both * kernels[j])

    return alignment_of(0, 1) / (alignment_of(0, 0) * alignment_of(1, 1)) ** 0.5


@settings(max_examples=20)
@given(n=st.integers(8, 24), d=st.integers(2, 6), k=st.integers(2, 7), shared=st.floats(0, 1), seed=st.integers(0, 9))
def test_is_the_definition(n, d, k, shared, seed):
    a = gaussian(n, d, seed)
    b = torch.cat([shared * a, (1 - shared) * gaussian(n, 3, seed + 100)], dim=1)
    assert cknna(a, b, k) == pytest.approx(by_definition(a, b, k), rel=1e-9, abs=1e-12)


def test_known_answers():
    a = gaussian(800, 12, 0)
    rotation = torch.linalg.qr(gaussian(12, 12, 1))[0]
    assert cknna(a, a) == pytest.approx(1, abs=1e-12)
    assert cknna(a, 3 * a @ rotation) == pytest.approx(1, abs=1e-9)  # neither rotation nor scale matters
    assert abs(cknna(a, gaussian(800, 12, 2))) < 0.02
    noisy = a + 0.5 * gaussian(800, 12, 3)
    assert 0.1 < cknna(a, noisy) < 0.9
    assert cknna(a, noisy) == pytest.approx(cknna(noisy, a), rel=1e-3)  # not exactly: neighbourhood is one-sided


def test_blocks_change_nothing(monkeypatch):
    a, b = gaussian(50, 6, 0), gaussian(50, 6, 0) + gaussian(50, 6, 1)
    whole = cknna(a, b, 5)
    monkeypatch.setattr(alignment, "_BLOCK", 7)
    assert cknna(a, b, 5) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "k", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(6, 2), 2, "same images"),
        (torch.zeros(5, 2, 1), torch.zeros(5, 2), 2, "same images"),
        (torch.rand(5, 2), torch.rand(5, 2), 5, "needs k of at least 2 and 6 images"),
        (torch.rand(5, 2), torch.rand(5, 2), 1, "at least 2"),
        (torch.full((9, 2), float("nan")), torch.rand(9, 2), 2, "not finite"),
        (torch.zeros(9, 2), torch.rand(9, 2), 2, "no structure"),
    ],
)
def test_refusals(a, b, k, message):
    with pytest.raises(UserError, match=message):
        cknna(a, b, k)
