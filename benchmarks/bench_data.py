"""Images per second of the two loaders on the same JPEGs: DALI against worker processes with Pillow.

    python -m benchmarks.bench_data [--images 2000] [--rounds 5] [--threads 1 2] [--batch 64] [--out FILE]

The files are 500 x 375 crops of the photographs that scikit-image and scikit-learn carry (about the mean size of
ImageNet's pictures), drawn by a fixed seed. Random and centre crops of 256 px. A round is one pass of each loader over
all images, in turn, with the same number of threads (DALI) and workers (torchvision); what is printed are medians over
rounds with the 20 % and 80 % quantiles. Beside the images per second of the clock stand those per second of processor
time, all threads and processes counted: the speed per core, which a busy machine disturbs less. Before anything is
timed, the batches of both are compared: a picture that differs by 2/255 or more on average ends the benchmark with exit
status 1.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from aligntok.config import DataConfig
from aligntok.data.dali import DaliSource
from aligntok.data.images import ImageSet, open_images
from aligntok.data.sources import Source, StreamSource
from aligntok.runtime.files import write_bytes
from benchmarks.machine import machine_line

LOADERS = {"torchvision": StreamSource, "DALI": DaliSource}
SIZE = 256
WIDTH, HEIGHT = 500, 375  # about the mean of ImageNet
TOLERANCE = 2 / 127.5  # 2/255 of the range, on [-1, 1]
QUALITY = 90
_WARM_UP = 2  # steps before the clock starts: workers are started, DALI's buffers grow
_PHOTOGRAPHS = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    "sklearn": ("china.jpg", "flower.jpg"),
}


def photographs() -> list[Image.Image]:
    """The colour photographs of both packages, as RGB."""
    import skimage
    import sklearn.datasets

    folders = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.datasets.__file__).parent / "images",
    }
    return [
        Image.open(folders[package] / name).convert("RGB") for package, names in _PHOTOGRAPHS.items() for name in names
    ]


def write_jpegs(folder: Path, count: int) -> ImageSet:
    """`count` crops of the photographs, resized to 500 x 375, as JPEG files."""
    random, pictures = np.random.default_rng(0), photographs()
    for index in range(count):
        picture = pictures[index % len(pictures)]
        scale = min(picture.width / WIDTH, picture.height / HEIGHT) * random.uniform(0.6, 1)
        width, height = WIDTH * scale, HEIGHT * scale
        left, top = random.uniform(0, picture.width - width), random.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        made = picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
        made.save(folder / f"{index:06d}.jpg", quality=QUALITY)
    return open_images(str(folder))


def difference(images: ImageSet, crop: str, batch: int) -> float:
    """The largest mean absolute difference of a picture between the loaders' first two batches, on [-1, 1]."""
    data = DataConfig(image_size=SIZE, workers=1)
    sources = [loader(images, data, crop, batch, seed=0) for loader in LOADERS.values()]
    pairs = [[source.batch(step)["images"] for source in sources] for step in range(2)]
    return max((a - b).abs().mean((1, 2, 3)).max().item() for a, b in pairs)


def processor_seconds() -> float:
    """Of this process and its living children, all threads."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def one_pass(source: Source, count: int, batch: int) -> tuple[float, float]:
    """(seconds, processor seconds) per image over about `count` images."""
    for step in range(_WARM_UP):
        source.batch(step)
    steps = max(1, count // batch)
    began, used = time.perf_counter(), processor_seconds()
    for step in range(_WARM_UP, _WARM_UP + steps):
        source.batch(step)
    images = steps * batch
    return (time.perf_counter() - began) / images, (processor_seconds() - used) / images


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _rates(seconds: list[float]) -> str:
    rate = f"{1 / statistics.median(seconds):.0f}"
    return f"{rate} ({1 / _quantile(seconds, 0.8):.0f} .. {1 / _quantile(seconds, 0.2):.0f})"


def row(images: ImageSet, crop: str, threads: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
    data = DataConfig(image_size=SIZE, workers=threads)
    for number in range(options.rounds):
        order = list(LOADERS.items())
        for name, loader in order[number % 2 :] + order[: number % 2]:
            source = loader(images, data, crop, options.batch, seed=number)
            samples[name].append(one_pass(source, len(images), options.batch))
            del source
    columns = []
    for kind in (0, 1):
        found = {name: [sample[kind] for sample in values] for name, values in samples.items()}
        ratio = statistics.median(found["torchvision"]) / statistics.median(found["DALI"])
        columns += [*(_rates(found[name]) for name in LOADERS), f"**{ratio:.2f}x**"]
    return f"| {crop} {SIZE} | {threads} | " + " | ".join(columns) + " |"


def main() -> int:
    """Print the table; exit status 1 if the loaders' batches differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5, help="passes of each loader over the images")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="threads of DALI, workers of torchvision"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", help="file that also gets what is printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [machine_line(), f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, batches of {options.batch}"]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        images = write_jpegs(Path(folder), options.images)
        for crop in ("random", "center"):
            found = difference(images, crop, min(options.batch, options.images))
            lines.append(f"{crop} crop: pictures differ by at most {found * 127.5:.2f}/255 on average")
            print(lines[-1])
            if found >= TOLERANCE:
                print("that is too much: nothing is timed")
                return 1
        heads = [f"{name}, img/s{unit}" for unit in ("", " of processor time") for name in (*LOADERS, "ratio")]
        heads = [head.partition(",")[0] if head.startswith("ratio") else head for head in heads]
        lines += ["", "| crop | threads | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
        print("\n".join(lines[-3:]))
        for crop, threads in product(("random", "center"), options.threads):
            lines.append(row(images, crop, threads, options))
            print(lines[-1], flush=True)
    if options.out:
        write_bytes(options.out, ("\n".join(lines) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
