"""`aligntok evaluate`: reconstruction, generation and probe of trained models, and the metrics' self-test.

Each part prints tables and under them the protocol of every number, and writes both to a JSON file on request. What is
kept of the images does not grow with their number, but for the pooled latents of a probe.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aligntok.config import PerceptualConfig, PerceptualKind
from aligntok.data.geometry import check_size
from aligntok.data.images import open_images
from aligntok.errors import UserError
from aligntok.evaluation.adm import refuse_as_originals
from aligntok.evaluation.alignment import check_neighbours
from aligntok.evaluation.checks import require_writable
from aligntok.evaluation.crops import crops_with_bar
from aligntok.evaluation.features import EfficientNetLite0, FeatureExtractor
from aligntok.evaluation.generated import KEPT_SAMPLES, ImageFeatures, require_enough
from aligntok.evaluation.inception import Inception, find_inception
from aligntok.evaluation.probes import Alignment, cross_validated_probes, trained_probes
from aligntok.evaluation.sample_sources import DrawnSamples, RealImages, StoredSamples
from aligntok.evaluation.second_opinion import torch_fidelity_numbers
from aligntok.evaluation.self_test import self_test
from aligntok.evaluation.tokenizer import Measured, stream_reconstruction, told_left_out
from aligntok.evaluation.trained_probe import check_recipe
from aligntok.losses.perceptual import build_perceptual
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.devices import Precision, choose_precision
from aligntok.runtime.files import write_bytes
from aligntok.runtime.world import refuse_several
from aligntok.training.distributed import LONG_TIMEOUT, start
from aligntok.training.monitoring.telemetry import Telemetry

Numbers = dict[str, Measured]


def evaluate_reconstruction(
    tokenizer: str,
    images: str,
    held_out: float,
    image_size: int,
    perceptual: PerceptualKind,
    perceptual_weights: str | None,
    inception: str | None,
    output: str | None,
    device: str,
) -> Numbers:
    """`aligntok evaluate reconstruction`; its options: aligntok.config.options.EvaluateReconstructionConfig."""
    refuse_as_originals(images)
    require_writable(output=output)
    precision, telemetry = choose_precision(device), Telemetry(".", log_every=1)
    tok = load_tokenizer(tokenizer).to(precision.device)
    check_size(image_size, tok.downsample, "image_size")
    training, kept = open_images(images, say=telemetry.say).split(held_out)
    originals = kept if len(kept) else training
    network = inception_given(inception, precision, telemetry)
    extractors: list[FeatureExtractor] = [] if network is None else [network]
    extractors.append(EfficientNetLite0().to(precision.device))
    distance = None
    if perceptual != "none":
        distance = build_perceptual(PerceptualConfig(kind=perceptual, weights=perceptual_weights)).to(precision.device)
    with crops_with_bar(originals, image_size, "reconstructing", telemetry) as batches:
        measured = stream_reconstruction(tok, (pixels for pixels, _ in batches), precision, distance, extractors)
    share = f"held-out share {held_out:g} of {images}" if len(kept) else f"all of {images}"
    measured.protocol += f"; centre crops of {share}; {precision}"
    return report({"reconstruction": measured}, output)


def evaluate_generation(
    generator: str | None,
    tokenizer: str | None,
    samples_file: str | None,
    reference: str,
    labels: str,
    count: int,
    steps: int | None,
    guidance: float | None,
    guidance_channels: int | None,
    guidance_interval: tuple[float, float] | None,
    seed: int,
    npz: str | None,
    inception: str | None,
    fidelity: bool,
    output: str | None,
    device: str,
) -> Numbers:
    """`aligntok evaluate generation`; the options are those of aligntok.config.options.EvaluateGenerationConfig.

    Under torchrun every process but the first returns nothing.
    """
    if samples_file is not None:
        refuse_several("evaluate generation --samples_file")
    require_writable(npz=npz, output=output)
    with start(device, LONG_TIMEOUT) as world:
        precision, telemetry = choose_precision(device), Telemetry(".", log_every=1)
        samples: DrawnSamples | StoredSamples
        if samples_file is not None:
            if generator is not None or npz is not None:
                raise UserError("--samples_file measures samples that exist: leave out --generator and --npz")
            samples = StoredSamples(samples_file, telemetry)
            require_enough(samples.count, "samples")
        elif generator is None or tokenizer is None:
            raise UserError("evaluate generation needs --generator and --tokenizer, or --samples_file")
        else:
            sampler = _given(steps, guidance, guidance_channels, guidance_interval)
            samples = DrawnSamples(generator, tokenizer, sampler, labels, count, seed, precision, telemetry)
        if isinstance(samples, DrawnSamples) and not world.main:
            samples.hand_over()
            return {}
        network = inception_given(inception, precision, telemetry)
        if fidelity and (network is None or (samples_file is None and npz is None)):
            raise UserError("--fidelity true needs Inception weights (--inception) and samples on the disk (--npz)")
        real = RealImages(reference, samples.size, network, precision, telemetry)
        if fidelity and not real.count:
            raise UserError(f"--fidelity true compares images, and {reference} holds moments alone: leave it out")
        if isinstance(samples, DrawnSamples) and npz is not None:
            samples = samples.store(npz)
        made = ImageFeatures(network, real.extractors, KEPT_SAMPLES).add_all(samples.batches("measuring samples"))
        telemetry.say("comparing with the reference")
        found = real.compare(made, seed)
        if fidelity:
            assert network is not None
            found["generation, torch-fidelity"] = torch_fidelity_numbers(
                lambda: samples.batches("torch-fidelity: samples"), samples.count, real.images, real.count, network
            )
        for measured in found.values():
            measured.protocol += f"; reference: {reference}; samples: {samples.protocol}"
        return report(found, output)


def _given(
    steps: int | None,
    guidance: float | None,
    guidance_channels: int | None,
    guidance_interval: tuple[float, float] | None,
) -> dict[str, Any]:
    """What of the generator's own sampler is to be replaced."""
    options = {"steps": steps, "guidance": guidance, "guidance_interval": guidance_interval}
    replaced: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if guidance_channels is not None:
        replaced["guidance_channels"] = guidance_channels or None
    return replaced


def evaluate_probe(
    tokenizer: str,
    images: str,
    train: str | None,
    val: str | None,
    image_size: int,
    epochs: int,
    batch_size: int,
    encoder: str | None,
    encoder_weights: str,
    alignment_images: int,
    neighbours: int,
    seed: int,
    output: str | None,
    device: str,
) -> Numbers:
    """`aligntok evaluate probe`; the options are those of aligntok.config.options.EvaluateProbeConfig."""
    if (train is None) != (val is None):
        raise UserError("the minibatch probe needs both --train and --val; a small set is given by --images")
    check_recipe(epochs, batch_size)
    if alignment_images:  # as asked for; `Alignment.expect` looks at the images that there are
        check_neighbours(neighbours, alignment_images)
    require_writable(output=output)
    precision, telemetry = choose_precision(device), Telemetry(".", log_every=1)
    tok = load_tokenizer(tokenizer).to(precision.device)
    check_size(image_size, tok.downsample, "image_size")
    alignment = Alignment(tok, encoder, encoder_weights, alignment_images, neighbours, precision)
    if train is not None and val is not None:
        telemetry.say("probe: BatchNorm and a linear layer trained by minibatches on --train, judged on --val")
        found = trained_probes(
            tok, (train, val), image_size, (epochs, batch_size, seed), alignment, precision, telemetry
        )
    else:
        telemetry.say("probe: cross-validated logistic regression, for small sets; --train and --val for large ones")
        found = cross_validated_probes(tok, images, image_size, seed, alignment, precision, telemetry)
    aligned = alignment.measure()
    if aligned is None and alignment_images:
        telemetry.say("no CKNNA: this tokenizer has no pretrained encoder to compare with; name one with --encoder")
    return report(found | ({} if aligned is None else {"alignment": aligned}), output)


def evaluate_self_test() -> None:
    """`aligntok evaluate self-test`; ends with status 1 if a metric fails."""
    with Telemetry(".", log_every=1).bar("self-test") as update:
        checks = self_test(update)
    table = Table(title="metrics on distributions with a known answer", title_justify="left")
    for column in ("metric", "distribution"):
        table.add_column(column)
    for column in ("expected", "found", "tolerance", ""):
        table.add_column(column, justify="right")
    for check in checks:
        numbers = (f"{value:.4g}" for value in (check.expected, check.found, check.tolerance))
        table.add_row(escape(check.metric), check.case, *numbers, "pass" if check.passed else "FAIL")
    _console().print(table)
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    if failed:
        raise SystemExit(1)


def inception_given(given: str | None, precision: Precision, telemetry: Telemetry) -> Inception | None:
    """The network of --inception on the run's device; without it the reason is said."""
    network, why = find_inception(given)
    if network is None:
        telemetry.say(why)
        return None
    if not network.published:
        telemetry.say(f"warning: {network.path} is not the published file, so no number of it is called FID")
    return network.to(precision.device)


def report(found: Numbers, output: str | None) -> Numbers:
    """Print tables with their protocols; write the same as JSON."""
    console = _console()
    for name, measured in found.items():
        table = Table(title=name, title_justify="left")
        for key in measured.values:
            table.add_column(escape(key), justify="right", overflow="fold")
        table.add_row(*(f"{value:.4f}" for value in measured.values.values()))
        console.print(table)
    for name, measured in found.items():
        print(f"{name}: {measured.protocol}")
        if measured.left_out:
            print(f"{name}: {told_left_out(measured.left_out)}")
    if output is not None:
        numbers = {name: _as_json(measured) for name, measured in found.items()}
        write_bytes(output, json.dumps(numbers, indent=1).encode())
    return found


def _as_json(measured: Measured) -> dict[str, Any]:
    told: dict[str, Any] = {"values": measured.values, "protocol": measured.protocol}
    return told | ({"left out": measured.left_out} if measured.left_out else {})


def _console() -> Console:
    """Standard output; a file or pipe has no width of its own, and 80 columns would break the tables."""
    return Console(width=None if sys.stdout.isatty() else 140)
