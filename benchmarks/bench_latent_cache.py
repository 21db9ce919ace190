"""What the latent cache saves Stage 3, and what reading it costs a generator.

    python -m benchmarks.bench_latent_cache [step] [epoch] [options]        both parts without a name

step    Stage 3 with online encoding and from a cache, in one run: the same network, the same images, adversarial loss
        on, no perceptual loss. Steps alternate; a step is the batch, its move, both phases and both optimizers. The
        first losses must agree (to the rounding of bf16) before anything is timed. Below it, counted and not measured:
        what part of a step's FLOPs the encoder is at the paper's size.
epoch   One epoch of a generator's batches from synthetic caches of 1,000 to 1,000,000 images, each in a process of its
        own. Anonymous memory (RssAnon) is what the process holds; file memory (RssFile) is the part of the page cache
        that it has mapped, which the kernel takes back when it likes. Both are the growth since the cache was opened.
        A generator's order takes 16 bytes an image of it. The shards are sparse files: their rows come from the page
        cache or are zeros, never from a disk.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from aligntok.commands.cache_latents import cache_latents
from aligntok.config import (
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    StageConfig,
    TokenizerConfig,
    TrainingConfig,
)
from aligntok.data.frozen import FrozenNetwork, FrozenOutput, latents_in_batch
from aligntok.data.images import load_center_crops, open_images
from aligntok.data.latent_cache import CachedLatentSource, LatentCache, LatentsBeside
from aligntok.data.latent_format import FORMAT, VERSION, Origin, shard_file
from aligntok.data.shard_store import MANIFEST
from aligntok.data.sources import MemorySource, Source
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.tokenizer import AlignTok
from aligntok.runtime.devices import choose_precision
from aligntok.training.feed import move
from aligntok.training.loop import run_phase
from aligntok.training.objective import Values
from aligntok.training.recovery.guard import Guard
from aligntok.training.tokenizer_objective import FrozenInputs, TokenizerObjective
from benchmarks.machine import DEVICE, machine_line, seconds_of

SIZES = (1_000, 10_000, 100_000, 1_000_000)
SHARD = 4096  # the command's default
# The cache rounds latents to bf16, 2^-8 of their magnitude; the L1 of one step has been seen to move by less than 1e-3
LOSS_TOLERANCE = 1e-2


class Stage3:
    """Stage 3 of a tokenizer on one source of batches."""

    def __init__(self, source: Source, build: Callable[[AlignTok], FrozenOutput], config: TokenizerConfig) -> None:
        torch.manual_seed(0)
        tokenizer = AlignTok(config).to(DEVICE)
        tokenizer.set_statistics(torch.zeros(tokenizer.latent_channels), torch.ones(tokenizer.latent_channels))
        losses = LossConfig(perceptual_weight=0.0)
        discriminator = PatchDiscriminator(losses.discriminator).to(DEVICE)
        self.precision = choose_precision(DEVICE)
        self.tokenizer, self.source = tokenizer, source
        self.samples: list[float] = []
        training = TrainingConfig()
        stage = StageConfig(trains=("decoder",), steps=10**6)
        frozen = FrozenInputs(latents=build(tokenizer))
        self.objective = TokenizerObjective(
            tokenizer, discriminator, None, losses, stage, frozen, self.precision, training
        )
        self.guard = Guard("stage3", training, self.objective, source, Path(tempfile.gettempdir()))

    def step(self, number: int) -> float:
        """One whole training step; returns its L1 loss."""
        torch.manual_seed(number)
        batch = move(self.source.batch(number), self.precision.device)
        values: Values = {}
        self.guard.begin(number)
        for phase in self.objective.phases(number):
            values |= run_phase(self.objective, phase, batch, self.guard, print)
        self.objective.after_step()
        return values["l1"].item()

    def timed_step(self, number: int) -> None:
        """A step whose seconds are kept."""
        self.samples.append(seconds_of(lambda: self.step(number)))


def compare_steps(options: argparse.Namespace) -> bool:
    """Print the medians of both paths and their ratio; False if their losses differ."""
    encoder = EncoderConfig(name=options.encoder, weights="random")
    config = TokenizerConfig(encoder=encoder, decoder=DecoderConfig(base_channels=options.base_channels))
    with tempfile.TemporaryDirectory() as folder:
        paths = build_paths(Path(folder), config, options)
        first = {name: path.step(0) for name, path in paths.items()}
        print("first L1: " + ", ".join(f"{name} {loss:.6f}" for name, loss in first.items()))
        if not abs(first["cached"] - first["online"]) <= LOSS_TOLERANCE * first["online"]:
            print("the losses differ: nothing is timed")
            return False
        for number in range(options.rounds + 1):
            for path in paths.values():
                path.timed_step(number + 1)
    medians = {name: statistics.median(path.samples[1:]) for name, path in paths.items()}  # the first one warms up
    for name, seconds in medians.items():
        samples = paths[name].samples[1:]
        print(f"{name}: {seconds:.3f} s a step ({min(samples):.3f} .. {max(samples):.3f})")
    print(f"Stage 3, {options.encoder}, {options.image_size} px, batch {options.batch}, decoder of base width")
    print(f"{options.base_channels}: from the cache {medians['online'] / medians['cached']:.2f}x as fast as encoding")
    return True


def build_paths(folder: Path, config: TokenizerConfig, options: argparse.Namespace) -> dict[str, Stage3]:
    """Online encoding, and a cache that `aligntok cache-latents` makes of the embedded images."""
    pixels, labels = load_center_crops(open_images("embedded", options.images), options.image_size)
    source = MemorySource(pixels, labels, options.batch, seed=0, flip=True)
    precision = choose_precision(DEVICE)
    online = Stage3(source, lambda tokenizer: FrozenNetwork(tokenizer.raw_latents, precision), config)
    online.tokenizer.save(folder / "tokenizer")
    cache_latents(
        tokenizer=str(folder / "tokenizer"),
        images="embedded",
        output=str(folder / "cache"),
        image_size=options.image_size,
        flip=True,
        shard_size=SHARD,
        batch_size=32,
        workers=0,
        precision=precision.name,
        device=DEVICE,
    )
    cache = LatentCache(folder / "cache", online.tokenizer.fingerprint())
    numbers = cache.training_numbers(DataConfig(image_size=options.image_size, max_images=options.images))
    beside = LatentsBeside(source, cache, numbers)
    cached = Stage3(beside, lambda tokenizer: lambda batch: tokenizer.denormalise(latents_in_batch(batch)), config)
    return {"online": online, "cached": cached}


def print_share() -> None:
    """FLOPs of Stage 3 at the paper's size, counted on the meta device: the encoder against what is trained."""
    with torch.device("meta"):
        tokenizer = AlignTok(TokenizerConfig(encoder=EncoderConfig(weights="random")))
        discriminator = PatchDiscriminator(LossConfig().discriminator)
        image, latents = torch.empty(1, 3, 256, 256), torch.empty(1, tokenizer.latent_channels, 16, 16)
    tokenizer.encoder.requires_grad_(False)
    tokenizer.adapter.requires_grad_(False)
    encoding = gigaflops(lambda: tokenizer.raw_latents(image))
    # the discriminator: once for the decoder's loss, twice for its own
    trained = gigaflops(lambda: tokenizer.decoder(latents)) + 3 * gigaflops(lambda: discriminator(image))
    print(
        f"counted, not measured: DINOv2 ViT-L/14 encodes an image of 256 px in {encoding:.0f} GFLOP; Stage 3 without "
        f"LPIPS trains on it in {trained:.0f} GFLOP: encoding is {encoding / (encoding + trained):.0%} of both"
    )


def gigaflops(run: Callable[[], torch.Tensor]) -> float:
    """Of `run` and, where something in it is trained, of the backward pass."""
    with FlopCounterMode(display=False) as counter:
        output = run()
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops() / 1e9


def synthetic_cache(folder: Path, count: int, shape: tuple[int, int, int]) -> None:
    """A cache of `count` images whose latents are zeros that take no place on the disk."""
    shards = []
    for number in range(-(-count // SHARD)):
        rows = min(SHARD, count - number * SHARD)
        latents, begin, header = 2 * rows * shape[0] * shape[1] * shape[2], 0, {}
        tensors = {"index": ("I64", [rows], 8 * rows), "labels": ("I64", [rows], 8 * rows)}
        tensors |= {name: ("BF16", [rows, *shape], latents) for name in ("flipped", "latents")}
        for name, (dtype, dimensions, size) in tensors.items():
            header[name] = {"dtype": dtype, "shape": dimensions, "data_offsets": [begin, begin + size]}
            begin += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / shard_file(number), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + begin)
        shards.append({"file": shard_file(number), "rows": rows, "bytes": 8 + len(text) + begin, "sha256": ""})
    ones = [1.0] * shape[0]
    origin = Origin("", ones, ones, list(shape), "", "synthetic", count, ["all"], 256, True, "bf16", SHARD)
    manifest = {"format": FORMAT, "version": VERSION, "complete": True, **vars(origin), "shards": shards, "skipped": []}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def resident(kind: str) -> float:
    """MiB of this process's memory of a kind of /proc/self/status: RssAnon or RssFile."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {kind}")


def read_epoch(folder: str, batch: int) -> dict[str, float]:
    """Rows/s, largest growth of both kinds of memory in MiB, and milliseconds of the slowest batch."""
    torch.set_num_threads(1)
    torch.rand(batch).float()  # what torch allocates on first use is no part of the reader
    before = {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
    cache = LatentCache(folder)
    source = CachedLatentSource(cache, cache.training_numbers(DataConfig()), batch, seed=0, flip=True)
    steps, slowest, peak = -(-len(cache) // batch), 0.0, dict.fromkeys(before, 0.0)
    began = time.perf_counter()
    for step in range(steps):
        start = time.perf_counter()
        source.batch(step)
        slowest = max(slowest, time.perf_counter() - start)
        peak = {kind: max(peak[kind], resident(kind) - before[kind]) for kind in peak}
    seconds = time.perf_counter() - began
    return {"rows": steps * batch / seconds, "slowest": 1e3 * slowest, **peak}


def print_epochs(options: argparse.Namespace) -> None:
    """The table of `epoch`."""
    shape = tuple(options.shape)
    print(f"epoch of {options.batch_rows} rows a batch, latents {list(shape)}, one thread")
    print(f"{'images':>10} {'rows/s':>10} {'slowest batch':>14} {'anonymous':>11} {'file-backed':>12}")
    for count in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            synthetic_cache(Path(folder), count, shape)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(read_epoch, (folder, options.batch_rows))
        print(
            f"{count:>10,} {found['rows']:>10,.0f} {found['slowest']:>11.1f} ms {found['RssAnon']:>7.1f} MiB "
            f"{found['RssFile']:>8.0f} MiB",
            flush=True,
        )


def main() -> int:
    """Run the parts asked for; exit status 1 if the losses of `step` differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="step, epoch; both without a name")
    parser.add_argument("--encoder", default="vit_small_patch14_dinov2.lvd142m", help="timm name; random weights")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--base_channels", type=int, default=32, help="of the decoder; 128 is the paper's")
    parser.add_argument("--batch", type=int, default=8, help="images of a Stage-3 step")
    parser.add_argument("--images", type=int, default=64, help="in the image set of `step`")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each path")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="images of the caches of `epoch`")
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 8, 8), help="of the latents of `epoch`: d h w")
    parser.add_argument("--batch_rows", type=int, default=1024, help="rows of a batch of `epoch`")
    parser.add_argument("--folder", help="where the caches of `epoch` are made; null = the system's temporary folder")
    options = parser.parse_args()
    unknown = set(options.parts) - {"step", "epoch"}
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected step or epoch")
    parts = options.parts or ["step", "epoch"]
    print(machine_line())
    agree = True
    if "step" in parts:
        agree = compare_steps(options)
        print_share()
    if "epoch" in parts:
        print_epochs(options)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
