"""`aligntok evaluate text-to-image`: pictures on a disk against the prompts that they were drawn from.

Everything that can be wrong is looked at first: folders, prompts, counts, weights. Then scores that need networks with
weights from outside, distances to real pictures, probes of real pictures with captions, and the folders that GenEval's
and DPG-Bench's own programs read.
"""

from __future__ import annotations

from aligntok.commands.evaluate import Numbers, inception_given, report
from aligntok.config.text import TextEncoderConfig
from aligntok.data.images import open_images
from aligntok.errors import UserError
from aligntok.evaluation.adm import sample_shape
from aligntok.evaluation.benchmark_folders import check_dpg, check_geneval, write_dpg, write_geneval
from aligntok.evaluation.checks import require_at_least, require_writable
from aligntok.evaluation.counted import check_count, with_counts
from aligntok.evaluation.crops import crops_with_bar
from aligntok.evaluation.generated import KEPT_SAMPLES, ImageFeatures, require_enough
from aligntok.evaluation.inception import Inception
from aligntok.evaluation.prompted import PromptedPictures, open_prompted, read_picture, refuse_unreadable
from aligntok.evaluation.prompts import read_prompts
from aligntok.evaluation.reference import read_reference
from aligntok.evaluation.sample_sources import RealImages
from aligntok.evaluation.text_probes import measure_probes, open_real
from aligntok.evaluation.text_scores import Weights, measure_scores, open_scorers
from aligntok.models.text_encoder import TextEncoder
from aligntok.runtime.devices import Precision, choose_precision
from aligntok.training.monitoring.telemetry import Telemetry


def evaluate_text(
    pictures: str,
    prompts: str | None,
    clip: str | None,
    hpsv2: str | None,
    hpsv2_1: str | None,
    pickscore: str | None,
    pickscore_processor: str | None,
    image_reward: str | None,
    image_reward_tokenizer: str,
    reference: str | None,
    fid_count: str | None,
    inception: str | None,
    real: str | None,
    real_captions: str | None,
    held_out: float,
    candidates: int,
    text_encoder: str,
    image_size: int | None,
    geneval: str | None,
    dpg: str | None,
    seed: int,
    output: str | None,
    device: str,
) -> Numbers:
    """The command; the options are those of aligntok.config.options.EvaluateTextConfig."""
    weights = Weights(clip, hpsv2, hpsv2_1, pickscore, pickscore_processor, image_reward, image_reward_tokenizer)
    scored = any((clip, hpsv2, hpsv2_1, pickscore, image_reward))
    if not (scored or reference or real or geneval or dpg):
        raise UserError(
            "nothing to measure: give weights (--clip, --hpsv2, --hpsv2_1, --pickscore, --image_reward), --reference "
            "for gFID, --real for retrieval of captions, or --geneval or --dpg for other programs"
        )
    require_at_least(2, candidates=candidates)
    require_writable(output=output)
    precision, telemetry = choose_precision(device), Telemetry(".", log_every=1)
    drawn = open_prompted(pictures, None if prompts is None else read_prompts(prompts))
    telemetry.say(f"{len(drawn)} pictures of {drawn.prompts.protocol}")
    _check_before(drawn, reference, fid_count, geneval, dpg)
    side = image_size or min(read_picture(drawn.files[0][0]).size)
    known = None if real is None else open_real(real, real_captions, held_out, telemetry)
    encoder = None if real is None else TextEncoder(TextEncoderConfig(name=text_encoder), precision)
    network = None if reference is None else inception_given(inception, precision, telemetry)
    scorers = open_scorers(weights, precision.device, telemetry.say)
    for told, write, folder in (("GenEval", write_geneval, geneval), ("DPG-Bench", write_dpg, dpg)):
        if folder is not None:
            with telemetry.bar(f"writing for {told}") as update:
                telemetry.say(write(drawn, folder, update))
    found: Numbers = {}
    if scorers:
        with telemetry.bar("scoring") as update:
            found |= measure_scores(drawn, scorers, update)
    if reference is not None:
        found |= measure_distances(drawn, reference, side, fid_count, network, seed, precision, telemetry)
    if known is not None and encoder is not None:
        found |= measure_probes(drawn, known, side, encoder, candidates, seed, precision, telemetry)
    return report(found, output) if found else found


def _check_before(
    drawn: PromptedPictures, reference: str | None, fid_count: str | None, geneval: str | None, dpg: str | None
) -> None:
    """UserError for what can be known before a network is loaded."""
    if geneval is not None:
        check_geneval(drawn, geneval)
    if dpg is not None:
        check_dpg(drawn, dpg)
    if fid_count is not None and reference is None:
        raise UserError(f"--fid_count {fid_count} belongs to gFID: give --reference too, or leave it out")
    if reference is not None:
        require_enough(len(drawn), "pictures")
        check_count(fid_count, len(drawn), "in --pictures", "draw as many, or leave --fid_count out")
        real = None if fid_count is None else _images_in(reference)
        if real is not None:
            check_count(fid_count, real, "in --reference", "give as many real ones")


def _images_in(reference: str) -> int | None:
    """Real pictures that are named or stored, readable or not; None = moments, which do not say of how many."""
    if not reference.endswith(".npz"):
        return len(open_images(reference, say=_unsaid))
    return sample_shape(reference)[0] if read_reference(reference) is None else None


def _unsaid(line: str) -> None:
    """Said when the set is opened again to be read."""


def measure_distances(
    drawn: PromptedPictures,
    reference: str,
    side: int,
    fid_count: str | None,
    inception: Inception | None,
    seed: int,
    precision: Precision,
    telemetry: Telemetry,
) -> Numbers:
    """gFID and the other numbers of ADM's protocol, and gFD of EfficientNet-Lite0, named by their counts."""
    real = RealImages(reference, side, inception, precision, telemetry)
    count = None if real.batch is not None else real.count  # moments do not say of how many pictures they are
    if count is not None:
        check_count(fid_count, count, "readable ones in --reference", "give as many real ones")
    images = drawn.images()
    made = ImageFeatures(inception, real.extractors, KEPT_SAMPLES)
    with crops_with_bar(images, side, "measuring pictures", telemetry) as batches:
        made.add_all(pixels for pixels, _ in batches)
    refuse_unreadable(images)
    found = with_counts(real.compare(made, seed), len(drawn), count)
    for measured in found.values():
        against = f"{reference}, {count or 'an unknown number of'} pictures"
        measured.protocol += f"; centre crops of {side} px; reference: {against}; {drawn.prompts.protocol}"
    return found
