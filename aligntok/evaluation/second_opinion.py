"""torch-fidelity's own numbers for the same images and weights: a second implementation beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils.data import Dataset

from aligntok.evaluation.adm import NEIGHBOURS, SPLIT
from aligntok.evaluation.features import metric_name
from aligntok.evaluation.inception import Inception
from aligntok.evaluation.tokenizer import Measured

Batches = Callable[[], Iterator[Tensor]]  # starts from the first image each time that it is called
_BATCH = 64


class _InOrder(Dataset):
    """Images of a stream as torch-fidelity wants them: by number. Reading goes on from the last number, or restarts."""

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count
        self._rows, self._next = iter(()), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if index < self._next:
            self._rows, self._next = (row for batch in self.batches() for row in batch), 0
        for _ in range(index - self._next):
            next(self._rows)
        self._next = index + 1
        return next(self._rows)


def torch_fidelity_numbers(
    samples: Batches, count: int, reference: Batches, reference_count: int, inception: Inception
) -> Measured:
    """FID, Inception score, precision and recall of `count` samples by torch-fidelity.

    Args:
        samples: uint8 batches [B, 3, H, W].
        count: their number.
        reference: real images, as batches too.
        reference_count: their number.
        inception: gives the weight file and the device.
    """
    from torch_fidelity import calculate_metrics

    splits = max(1, round(count / SPLIT))
    found = calculate_metrics(
        input1=_InOrder(samples, count),
        input2=_InOrder(reference, reference_count),
        isc=True,
        fid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        # Unpickled without restrictions there; Inception has read the same file with them before
        feature_extractor_weights_path=str(inception.path),
        isc_splits=splits,
        prc_neighborhood=NEIGHBOURS,
        samples_shuffle=False,
        batch_size=_BATCH,
        save_cpu_ram=True,  # no worker processes: the stream is read in order
        cuda=inception.device.type == "cuda",
        cache=False,
        verbose=False,
    )
    names = {
        "frechet_inception_distance": "gFID",
        "inception_score_mean": "IS",
        "precision": "precision",
        "recall": "recall",
    }
    values = {metric_name(ours, inception): float(found[theirs]) for theirs, ours in names.items()}
    against = f"{reference_count} reference images, with moments of these"
    return Measured(values, f"torch-fidelity, {count} samples against {against}; IS in {splits} splits; k={NEIGHBOURS}")
