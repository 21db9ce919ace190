"""Where records go besides metrics.jsonl: TensorBoard always, Weights & Biases where a project is named.

TensorBoard has one run per part, OUTPUT/tensorboard/PART. A resumed part tells it to forget the steps that it will take
again. W&B has one run for the whole output folder, with a step axis for each part; its id lies in OUTPUT/wandb.json,
so that a resumed command goes on in the same run. W&B cannot forget: steps taken again after a kill appear twice there.
"""

from __future__ import annotations

import importlib
import io
import json
import threading
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from aligntok.errors import UserError
from aligntok.runtime.files import write_bytes

Record = dict[str, Any]


class Tracker(Protocol):
    name: str

    def begin(self, part: str, start: int, settings: dict[str, Any]) -> None:
        """A part starts after step `start`."""

    def scalars(self, record: Record) -> None:
        """One line of metrics.jsonl."""

    def picture(self, part: str, step: int, png: bytes) -> None:
        """A preview."""

    def end(self) -> None:
        """The part is over, or stopped."""


class TensorBoard:
    """See the module docstring; the writer is opened with the first thing to write, which takes a second."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._part, self._start = "", 0
        self._writer: Any = None

    def begin(self, part: str, start: int, settings: dict[str, Any]) -> None:
        self._part, self._start = part, start

    @property
    def writer(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            if threading.excepthook is not _without_writers:
                threading.excepthook = _without_writers
            self._writer = SummaryWriter(str(self.folder / self._part), purge_step=self._start + 1)
        return self._writer

    def scalars(self, record: Record) -> None:
        for key, value in record.items():
            if key not in ("part", "step"):
                self.writer.add_scalar(key, value, record["step"])

    def picture(self, part: str, step: int, png: bytes) -> None:
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self.writer.add_image("preview", pixels, step, dataformats="HWC")

    def end(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


_excepthook = threading.excepthook


def _without_writers(args: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's writing thread on a full disk: its error is raised again by the next call."""
    if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
        _excepthook(args)


class WeightsAndBiases:
    """See the module docstring. Call `require_wandb` first.

    Raises:
        UserError: the run cannot be started (no login, no network).
    """

    name = "W&B"

    def __init__(self, folder: Path, project: str) -> None:
        self._wandb = require_wandb()
        file = folder / "wandb.json"
        run_id = json.loads(file.read_text())["id"] if file.is_file() else uuid4().hex[:8]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._wandb.init(project=project, id=run_id, name=folder.name, dir=str(folder), resume="allow")
        except Exception as error:  # the service's own errors; nothing has been trained yet
            raise UserError(
                f"W&B did not start ({type(error).__name__}: {error}): run `wandb login`, set WANDB_MODE=offline, "
                f"or leave training.wandb_project at null"
            ) from error
        write_bytes(file, json.dumps({"id": run_id, "project": project}).encode())

    def begin(self, part: str, start: int, settings: dict[str, Any]) -> None:
        self._run.define_metric(f"{part}/step")
        self._run.define_metric(f"{part}/*", step_metric=f"{part}/step")
        self._run.config.update({part: settings}, allow_val_change=True)

    def scalars(self, record: Record) -> None:
        part = record["part"]
        self._run.log({f"{part}/{key}": value for key, value in record.items() if key != "part"})

    def picture(self, part: str, step: int, png: bytes) -> None:
        from PIL import Image

        image = self._wandb.Image(Image.open(io.BytesIO(png)))
        self._run.log({f"{part}/preview": image, f"{part}/step": step})

    def end(self) -> None:
        """Nothing: the run goes on with the next part, and wandb closes it when the process ends."""


def require_wandb() -> Any:
    """The wandb module; UserError with the extra to install where it is absent."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"training.wandb_project is given, but wandb cannot be imported ({error}): "
            f"pip install 'aligntok[wandb]', or leave it at null"
        ) from error
