"""The DALI graph that decodes and crops a batch, and the few calls that drive it.

    bytes --decode--> [H, W, 3] --halve, k times--> --cubic over a region--> [S, S, 3] --flip, scale--> [3, S, S]

The crop is never cut out of a resized picture: the resize works on the crop's region of the original alone, on the same
sampling grid. One graph serves both devices. Nothing of DALI is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Inputs = Mapping[str, Sequence[np.ndarray | np.generic]]  # one array or number per picture, by the graph's names
DEPTH = 2  # batches inside the pipeline: one running, one behind it
MAX_HALVINGS = 8  # levels in the graph: 65,536 px at 256; larger pictures go through Pillow


def refusal() -> str | None:
    """Why DALI cannot be used here, with what to do about it; None where it can."""
    try:
        from nvidia.dali import fn  # noqa: F401
    except Exception as error:  # also broken installations: whatever the import raises is the reason
        first = (str(error).splitlines() or [""])[0]
        extras = "pip install 'aligntok[dali]', or 'aligntok[dali-cuda130]'"
        return f"nvidia.dali does not import ({first}); on Linux: {extras}"
    return None


def build_pipeline(crop: str, size: int, rows: int, threads: int, device: torch.device) -> Any:
    """The graph of the module's head, for up to `rows` pictures at a time."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"
    on_gpu = {"device": "mixed", "jpeg_fancy_upsampling": True} if gpu else {"device": "cpu"}
    index = (torch.cuda.current_device() if device.index is None else device.index) if gpu else None

    @pipeline_def(
        batch_size=rows,
        num_threads=threads,
        device_id=index,
        prefetch_queue_depth=DEPTH,
        enable_conditionals=crop == "center",
    )
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        begin = fn.external_source(name="begin", dtype=types.FLOAT, ndim=1)
        end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        images = fn.decoders.image(encoded, **on_gpu)
        if crop == "center":
            halvings = fn.external_source(name="halvings", dtype=types.INT32, ndim=0)
            shape = fn.external_source(name="shape", dtype=types.FLOAT, ndim=1)
            for level in range(MAX_HALVINGS):
                if halvings > level:
                    images, shape = halve(images, shape)
        images = fn.resize(
            images,
            size=[size, size],
            roi_start=begin,
            roi_end=end,
            interp_type=types.INTERP_CUBIC,  # a = -0.5 and widened when it shrinks, as Pillow's
            antialias=True,
        )
        scale = [127.5] * 3
        return fn.crop_mirror_normalize(images, mean=scale, std=scale, mirror=mirror, output_layout="CHW")

    pipeline = graph()
    pipeline.build()
    return pipeline


def halve(images: Any, shape: Any) -> tuple[Any, Any]:
    """(pictures of half the size, their shapes) by Pillow's box filter, as nodes of a graph.

    Where a side of n becomes m = n // 2, Pillow's output pixel j is the mean of input pixels round(j n/m) to
    round((j+1) n/m) - 1. Those are two, but for one place in the middle of an odd side, where the third is left out
    here: so the mean of four nearest-neighbour samplings, shifted against each other.
    """
    from nvidia.dali import fn, math, types

    half = math.floor(shape * 0.5)
    shift = (shape / half - 1.0) * 0.5
    corners = []
    for signs in ([-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]):
        start = shift * types.Constant(np.array(signs, np.float32))
        corners.append(
            fn.resize(images, size=half, roi_start=start, roi_end=start + shape, interp_type=types.INTERP_NN)
        )
    mean = (corners[0] + 0.0 + corners[1] + corners[2] + corners[3]) * 0.25  # + 0.0: bytes become float before the sum
    return fn.cast(mean, dtype=types.UINT8), half


def run(pipeline: Any, inputs: Inputs, start: bool = True) -> None:
    """Feed one batch and, unless told otherwise, start it."""
    for name, values in inputs.items():
        pipeline.feed_input(name, values)
    if start:
        pipeline.schedule_run()


def outputs(pipeline: Any, device: torch.device) -> Tensor:
    """The oldest batch that was started, without a copy: DALI's default executor hands the memory over for good."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    (images,) = pipeline.outputs(cuda_stream=stream)
    return torch.from_dlpack(images.as_tensor())


def sample_inputs(crop: str) -> Inputs:
    """A small JPEG with its numbers."""
    buffer = BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 199)).save(buffer, "JPEG")
    inputs: dict[str, list[np.ndarray | np.generic]] = {
        "encoded": [np.frombuffer(buffer.getvalue(), np.uint8)],
        "begin": [np.zeros(2, np.float32)],
        "end": [np.full(2, 16, np.float32)],
        "mirror": [np.int32(0)],
    }
    if crop == "center":
        inputs |= {"halvings": [np.int32(0)], "shape": [np.full(2, 16, np.float32)]}
    return inputs


def last_line(error: Exception) -> str:
    """The part of DALI's long messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "rror" in line and "pipeline" not in line]
    return (named or lines or [type(error).__name__])[0]
