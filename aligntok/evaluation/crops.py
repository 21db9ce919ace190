"""Centre crops of an image set, decoded as they are asked for: memory holds two batches, whatever the set's size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from aligntok.data.geometry import center_crop, to_tensor
from aligntok.data.images import ImageSet
from aligntok.data.loading import report_skipped
from aligntok.errors import UserError
from aligntok.training.telemetry import Telemetry

BATCH = 64
_DECODERS = 4  # threads; Pillow's decoders release the GIL


def stream_crops(
    images: ImageSet, size: int, batch_size: int = BATCH, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (uint8 [B, 3, size, size], labels [B]) of every readable picture, in order; the last may be smaller.

    Args:
        images: the set; pictures that cannot be read are recorded in its `skipped`.
        size: side of the centre crop.
        batch_size: pictures per batch.
        progress: called with (pictures done, all pictures) after every batch that was worked through.

    Raises:
        UserError: not a single picture could be read.
    """

    def cut(index: int) -> Tensor | None:
        picture = images.open(index)
        return None if picture is None else to_tensor(center_crop(picture, size))

    pending: deque[tuple[int, Future[Tensor | None]]] = deque()
    crops: list[Tensor] = []
    labels: list[int] = []
    found, started, done = 0, 0, 0
    with ThreadPoolExecutor(_DECODERS) as pool:
        while done < len(images):
            while started < len(images) and len(pending) < batch_size:
                pending.append((started, pool.submit(cut, started)))
                started += 1
            index, future = pending.popleft()
            crop, done = future.result(), done + 1
            if crop is not None:
                crops.append(crop)
                labels.append(images.entries[index].label)
            if crops and (len(crops) == batch_size or done == len(images)):
                found += len(crops)
                yield torch.stack(crops), torch.tensor(labels)
                crops, labels = [], []
                if progress is not None:
                    progress(done, len(images))
    if not found:
        name, reason = next(iter(images.skipped.items()))
        raise UserError(f"none of the {len(images)} images of {images.name} could be read; the first, {name}: {reason}")


@contextmanager
def crops_with_bar(
    images: ImageSet, size: int, title: str, telemetry: Telemetry
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Batches of centre crops with a progress bar; unreadable pictures are named at the end."""
    with telemetry.bar(title) as update:
        yield stream_crops(images, size, progress=update)
    report_skipped(images, telemetry.say)
