"""Centre crops of an image set as a stream that a person can watch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from aligntok.data.images import ImageSet, stream_crops
from aligntok.data.loading import report_skipped
from aligntok.training.monitoring.telemetry import Telemetry


@contextmanager
def crops_with_bar(
    images: ImageSet, size: int, title: str, telemetry: Telemetry
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Batches of centre crops with a progress bar; unreadable pictures are named at the end."""
    with telemetry.bar(title) as update:
        yield stream_crops(images, size, progress=update)
    report_skipped(images, telemetry.say)
