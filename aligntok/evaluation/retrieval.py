"""What a picture says of its caption, by probes of real pictures: caption retrieval and class agreement, without CLIP.

A linear map W from image features x [P] to text features t [D] is fitted on real pictures and their captions:

    min over W  sum_i |W x'_i - t'_i|^2 + s |W|^2,      x' standardised, t' = t - mean t

s is cross-validated, with all pictures of a caption in one fold. A picture finds its caption among k if cos(W x', t')
is largest for it, the k - 1 others being drawn from the distinct other captions of a pool. The mean over all such draws
is exact: with N others, of which b are nearer than the right one and t as near,

    p = sum_j C(t, j) C(N - b - t, k - 1 - j) / C(N, k - 1) / (j + 1)

so that a map that knows nothing has 1 / k. Real pictures that the map has not seen are the ceiling: a perfect generator
draws pictures like them. Everything is float64.

The probe and its features are ours: numbers are comparable only with those of the same real pictures and networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import UserError
from aligntok.evaluation.probe import can_be_probed, train_classifier
from aligntok.evaluation.tokenizer import Measured

CANDIDATES = 10  # k
FOLDS = 5
STRENGTHS = tuple(10.0**power for power in range(-1, 6))  # s above, of standardised features

TextFeatures = Callable[[list[str]], Tensor]  # captions -> [n, D]


@dataclass(frozen=True)
class Pictures:
    """Pictures as the probes see them.

    Attributes:
        features: [n, P].
        captions: n texts, the one that each picture was drawn from or belongs to.
        labels: integer classes [n]; None = they have none.
    """

    features: Tensor
    captions: list[str]
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.captions)
        shapes = [list(self.features.shape), None if self.labels is None else list(self.labels.shape)]
        if self.features.ndim != 2 or len(self.features) != n or shapes[1] not in (None, [n]) or not n:
            raise UserError(
                f"expected features [n, P], n captions and labels [n], got {shapes[0]}, {n} and {shapes[1]}"
            )
        if not self.features.isfinite().all():
            raise UserError("the image features hold values that are not finite; look at the pictures that gave them")

    def subset(self, rows: Tensor) -> Pictures:
        """The pictures of these numbers, in this order."""
        captions = [self.captions[row] for row in rows.tolist()]
        return Pictures(self.features[rows], captions, None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class CaptionMap:
    """The fitted map: image features [n, P] -> predicted text features [n, D], less the mean of the fitted captions.

    Attributes:
        weight: W [D, P], for standardised image features.
        strength: s, as it was chosen.
        cosine: cross-validated mean cosine at that strength.
        count: pictures that it was fitted on.
    """

    weight: Tensor
    image_mean: Tensor
    image_std: Tensor
    text_mean: Tensor
    strength: float
    cosine: float
    count: int

    def __call__(self, features: Tensor) -> Tensor:
        return ((features.double().cpu() - self.image_mean) / self.image_std) @ self.weight.T

    @property
    def protocol(self) -> str:
        return (
            f"ridge from {self.weight.shape[1]} standardised image features to {self.weight.shape[0]} text features, "
            f"fitted on n={self.count} real pictures, strength {self.strength:g} by {FOLDS} folds over captions "
            f"(cosine {self.cosine:.3f})"
        )


def same_text(caption: str) -> str:
    """What captions are compared by: case and white space do not make another one."""
    return " ".join(caption.casefold().split())


def fit_caption_map(
    images: Tensor, texts: Tensor, captions: Sequence[str], strengths: Sequence[float] = STRENGTHS, seed: int = 0
) -> CaptionMap:
    """Fit the module's ridge regression, its strength by the cross-validated mean cosine.

    Args:
        images: features of real pictures [n, P].
        texts: features of their captions [n, D].
        captions: the captions themselves, which keep equal ones in one fold.
        strengths: to choose from.
        seed: of the folds.

    Raises:
        UserError: other shapes, values that are not finite, or fewer distinct captions than folds.
    """
    x, t = images.double().cpu(), texts.double().cpu()
    if x.ndim != 2 or t.ndim != 2 or not len(x) == len(t) == len(captions):
        told = f"{list(images.shape)}, {list(texts.shape)} and {len(captions)}"
        raise UserError(f"expected image features [n, P], text features [n, D] and n captions, got {told}")
    if not (x.isfinite().all() and t.isfinite().all()):
        raise UserError("image or text features hold values that are not finite")
    group = _numbers([same_text(caption) for caption in captions])
    distinct = int(group.max()) + 1
    if distinct < FOLDS:
        raise UserError(f"{distinct} distinct captions of real pictures: cross-validation needs at least {FOLDS}")
    order = torch.randperm(distinct, generator=torch.Generator().manual_seed(seed))
    fold = (order % FOLDS)[group]
    cosines = torch.zeros(len(strengths), dtype=torch.float64)
    for number in range(FOLDS):
        inside, outside = fold != number, fold == number
        ridge = _Ridge(x[inside], t[inside])
        right = t[outside] - ridge.text_mean
        found = [F.cosine_similarity(ridge.predict(x[outside], s), right).sum() for s in strengths]
        cosines += torch.stack(found) / len(x)
    best = int(cosines.argmax())
    ridge = _Ridge(x, t)
    statistics = ridge.image_mean, ridge.image_std, ridge.text_mean
    return CaptionMap(ridge.weight(strengths[best]), *statistics, strengths[best], float(cosines[best]), len(x))


class _Ridge:
    """Ridge regression at every strength from one singular value decomposition."""

    def __init__(self, x: Tensor, t: Tensor) -> None:
        self.image_mean, std, self.text_mean = x.mean(0), x.std(0, correction=0), t.mean(0)
        self.image_std = torch.where(std > 1e-12, std, 1.0)  # a constant feature stays zero
        u, self.values, self.right = torch.linalg.svd((x - self.image_mean) / self.image_std, full_matrices=False)
        self.projected = u.T @ (t - self.text_mean)

    def weight(self, strength: float) -> Tensor:
        """[D, P]."""
        shrunk = self.values / (self.values.square() + strength)
        return (self.projected * shrunk[:, None]).T @ self.right

    def predict(self, x: Tensor, strength: float) -> Tensor:
        """[n, P] -> [n, D]."""
        shrunk = self.values / (self.values.square() + strength)
        return ((x - self.image_mean) / self.image_std @ self.right.T * shrunk) @ self.projected


@dataclass(frozen=True)
class Retrieval:
    """Share of pictures that find their caption among k, its standard error over pictures, and the pool's size."""

    accuracy: float
    error: float
    count: int
    pool: int
    candidates: int


def retrieval_accuracy(
    predicted: Tensor, captions: Sequence[str], pool: Sequence[str], pool_features: Tensor, k: int = CANDIDATES
) -> Retrieval:
    """How often the right caption is the nearest of k, over all draws of the others; see the module's docstring.

    Args:
        predicted: text features that were predicted from pictures [m, D].
        captions: the right text of each picture; all of them are in the pool.
        pool: texts to draw wrong ones from; of equal ones the first counts.
        pool_features: their features [N, D], centred like `predicted`.
        k: candidates, the right one among them.

    Raises:
        UserError: other shapes, a caption that is not in the pool, or a pool of fewer than k distinct texts.
    """
    if predicted.ndim != 2 or len(predicted) != len(captions) or pool_features.shape != (len(pool), predicted.shape[1]):
        told = f"{list(predicted.shape)}, {len(captions)}, {len(pool)} and {list(pool_features.shape)}"
        raise UserError(f"expected predictions [m, D], m captions, N texts and features [N, D], got {told}")
    place: dict[str, int] = {}
    for number, text in enumerate(map(same_text, pool)):
        place.setdefault(text, number)
    if not 2 <= k <= len(place):
        raise UserError(f"{k} candidates from {len(place)} distinct captions: expected 2 to {len(place)}; give others")
    column = {text: index for index, text in enumerate(place)}
    if missing := [text for text in captions if same_text(text) not in column]:
        raise UserError(f"{len(missing)} captions are not in the pool that candidates are drawn from: {missing[0]!r}")
    features = F.normalize(pool_features.double().cpu()[list(place.values())], dim=1)
    right = torch.tensor([column[same_text(text)] for text in captions])
    scores = F.normalize(predicted.double().cpu(), dim=1) @ features.T
    own = scores.gather(1, right[:, None])
    near = (scores - own).abs() <= 1e-12  # rounding is no difference
    nearer = ((scores > own) & ~near).sum(1)
    chances = _chance_to_win(nearer, near.sum(1) - 1, len(place) - 1, k)
    error = float(chances.std() / len(chances) ** 0.5) if len(chances) > 1 else float("nan")
    return Retrieval(float(chances.mean()), error, len(chances), len(place), k)


def _chance_to_win(nearer: Tensor, ties: Tensor, others: int, k: int) -> Tensor:
    """[m] p of the module's docstring, for b = `nearer` [m] and t = `ties` [m] of N = `others`."""
    rest = others - nearer - ties
    total = torch.zeros(len(nearer), dtype=torch.float64)
    for j in range(k):
        ways = _log_binomial(ties, j) + _log_binomial(rest, k - 1 - j)
        total += (ways - _log_binomial(torch.tensor(others), k - 1)).exp() / (j + 1)
    return total


def _log_binomial(n: Tensor, r: int) -> Tensor:
    n = n.double()
    possible = n >= r
    kept = torch.where(possible, n, float(r))
    found = torch.lgamma(kept + 1) - torch.lgamma(kept - r + 1) - torch.lgamma(torch.tensor(r + 1.0).double())
    return torch.where(possible, found, -torch.inf)


def measure_retrieval(
    fitted: Pictures,
    held_out: Pictures,
    generated: Pictures,
    encode: TextFeatures,
    k: int = CANDIDATES,
    seed: int = 0,
    text_protocol: str = "",
) -> Measured:
    """Caption retrieval of generated pictures beside that of real held-out ones (the ceiling) and chance.

    Args:
        fitted: real pictures that the map is fitted on.
        held_out: other real pictures.
        generated: pictures that were drawn from their captions.
        encode: captions -> features [n, D], the mean over a caption's real tokens for example.
        k: candidates, the right one among them.
        seed: of the folds.
        text_protocol: what `encode` is.

    Returns:
        "retrieval 1 of k" of the generated pictures, "..., real pictures" and "..., chance"; `extra` has the standard
        errors of the first two, "errors" [2].

    Raises:
        UserError: see `fit_caption_map` and `retrieval_accuracy`.
    """
    pool = list(dict.fromkeys([*held_out.captions, *generated.captions]))
    known = list(dict.fromkeys([*fitted.captions, *pool]))
    features = dict(zip(known, encode(known).double().cpu(), strict=True))
    texts = torch.stack([features[caption] for caption in fitted.captions])
    mapped = fit_caption_map(fitted.features, texts, fitted.captions, seed=seed)
    candidates = torch.stack([features[caption] for caption in pool]) - mapped.text_mean
    made, real = (
        retrieval_accuracy(mapped(pictures.features), pictures.captions, pool, candidates, k)
        for pictures in (generated, held_out)
    )
    name = f"retrieval 1 of {k}"
    values = {name: made.accuracy, f"{name}, real pictures": real.accuracy, f"{name}, chance": 1 / k}
    protocol = "; ".join(
        [
            mapped.protocol,
            *([text_protocol] if text_protocol else []),
            f"the right caption among {k} of {made.pool} distinct ones, mean over all draws",
            f"{_told(generated, fitted, made, 'generated')}, {_told(held_out, fitted, real, 'real held-out')}",
        ]
    )
    return Measured(values, protocol, {"errors": torch.tensor([made.error, real.error])})


def _told(pictures: Pictures, fitted: Pictures, found: Retrieval, kind: str) -> str:
    """Number of pictures, standard error, and how many have captions that the map was fitted with."""
    known = set(map(same_text, fitted.captions))
    seen = sum(same_text(caption) in known for caption in pictures.captions)
    return f"n={found.count} {kind} pictures ({seen} with captions of fitted ones; standard error {found.error:.4f})"


def measure_class_agreement(fitted: Pictures, held_out: Pictures, generated: Pictures) -> Measured | None:
    """Share of generated pictures that a linear probe of real ones assigns to the class that was asked for.

    Classes without a fitted picture take no part. None where a set has no labels, or the fitted pictures have no two
    classes of several members.

    Returns:
        "class agreement" of the generated pictures, "..., real pictures" of those held out, and "..., largest class",
        the share of the class that was asked for most often among the generated ones.
    """
    if fitted.labels is None or held_out.labels is None or generated.labels is None:
        return None
    if not can_be_probed(fitted.labels, folds=2):
        return None
    known = fitted.labels.unique()
    predict = train_classifier(fitted.features.double().cpu(), torch.searchsorted(known, fitted.labels), len(known))
    shares, counts = [], []
    for pictures in (generated, held_out):
        assert pictures.labels is not None
        taken = torch.isin(pictures.labels, known)
        if not taken.any():
            return None
        found = known[predict(pictures.features.double().cpu()[taken])]
        shares.append((found == pictures.labels[taken]).double().mean().item())
        counts.append(int(taken.sum()))
    asked = generated.labels[torch.isin(generated.labels, known)]
    largest = float(asked.bincount().max() / len(asked))
    name = "class agreement"
    protocol = (
        f"logistic regression on {fitted.features.shape[1]} standardised features of n={len(fitted.captions)} real "
        f"pictures, {len(known)} classes; {counts[0]} generated, {counts[1]} real pictures held out; largest class: "
        "share of the one asked for most often, which a constant answer scores"
    )
    return Measured({name: shares[0], f"{name}, real pictures": shares[1], f"{name}, largest class": largest}, protocol)


def _numbers(texts: list[str]) -> Tensor:
    """Equal texts get equal numbers, counted from 0 in their order."""
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(text, len(number)) for text in texts])
