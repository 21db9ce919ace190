"""`aligntok sample`: pictures of classes or of captions, as one sheet and, on request, each as its own file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.data.text_features import report_cut
from aligntok.errors import UserError
from aligntok.evaluation.asked import Asked, Captions
from aligntok.evaluation.checks import require_at_least, require_writable
from aligntok.evaluation.generation import check_pair, describe, draw
from aligntok.evaluation.prompts import read_prompts
from aligntok.models.generator import Generator
from aligntok.models.text_encoder import TextEncoder
from aligntok.models.tokenizer import load_tokenizer
from aligntok.report import pictures
from aligntok.runtime.devices import Precision, choose_precision
from aligntok.runtime.files import write_bytes
from aligntok.training.monitoring.telemetry import Telemetry

PROMPTS = "prompts.jsonl"  # beside single pictures: which belong to which prompt (aligntok evaluate text-to-image)
SHOWN = 60  # characters of a prompt beside its pictures


@dataclass(frozen=True)
class Wanted:
    """What is drawn, several pictures of each."""

    names: list[str]  # as the sheet calls them
    asked: Asked  # `per` of every name in a row
    records: list[dict[str, Any]]  # of prompts: what their file says of each; empty for classes


def sample(
    generator: str,
    tokenizer: str,
    output: str,
    labels: list[str | int] | int | str | None,
    prompt: list[str] | str | None,
    prompts: str | None,
    negative: str,
    text_encoder: str | None,
    size: tuple[int, int] | None,
    per_class: int,
    steps: int | None,
    guidance: float | None,
    guidance_channels: int | None,
    seed: int,
    separate: bool,
    device: str,
) -> None:
    """The command; the options are those of aligntok.config.options.SampleConfig."""
    require_at_least(1, per_class=per_class)
    require_writable(output=output)
    folder = Path(output).with_suffix("")
    if separate and (folder == Path(output) or folder.is_file()):
        raise UserError(
            f"--separate true writes single pictures into the folder {folder}, which is a file: give --output a name "
            "that ends in .png, and that no file has without it"
        )
    precision = choose_precision(device)
    network, tok = Generator(generator), load_tokenizer(tokenizer).to(precision.device)
    check_pair(network, tok)
    telemetry = Telemetry(Path(output).parent, log_every=1)
    texts = _texts(prompt, prompts)
    if texts is None and (negative or text_encoder):
        raise UserError("--negative and --text_encoder belong to captions: give --prompt or --prompts too")
    if texts is not None and labels not in (None, []):
        raise UserError("--labels and --prompt were both given: a generator draws classes or captions")
    wanted = (
        _classes(network, labels, per_class)
        if texts is None
        else _captions(network, texts, negative, text_encoder, per_class, precision, telemetry.say)
    )
    overrides: dict[str, Any] = {"steps": steps, "guidance": guidance, "guidance_channels": guidance_channels}
    sampler = replace(network.sampler, **{k: v for k, v in overrides.items() if v is not None})
    with telemetry.bar("sampling") as update:
        drawn = draw(network, tok, wanted.asked, sampler, precision, seed, update, size)
    write_bytes(output, pictures.grid(list(drawn.split(per_class)), [_short(name) for name in wanted.names]))
    if separate:
        _write_each(folder, drawn, wanted, per_class)
        telemetry.say(f"{len(drawn)} pictures in {folder}")
    telemetry.say(f"{output}: {len(drawn)} pictures; {describe(sampler)}, seed {seed}")


def _texts(prompt: list[str] | str | None, prompts: str | None) -> list[dict[str, Any]] | None:
    """{"prompt": ..., ...} of every prompt of the command line or of a file, None where none is given.

    Raises:
        UserError: both, or an empty one.
    """
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts were both given: give texts, or a file of them")
    if prompts is not None:
        return read_prompts(prompts).records
    if prompt is None:
        return None
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not texts or not all(text.strip() for text in texts):
        raise UserError("--prompt is empty: give a text, such as --prompt 'a red fox'")
    return [{"prompt": text} for text in texts]


def _classes(network: Generator, labels: list[str | int] | int | str | None, per: int) -> Wanted:
    if network.text is not None:
        raise UserError("this generator draws what a caption says: give --prompt 'a red fox', or --prompts FILE")
    numbers = class_numbers(labels, network.classes)
    return Wanted([network.classes[i] for i in numbers], torch.tensor(numbers).repeat_interleave(per), [])


def _captions(
    network: Generator,
    records: list[dict[str, Any]],
    negative: str,
    place: str | None,
    per: int,
    precision: Precision,
    say: Callable[[str], None],
) -> Wanted:
    if network.text is None:
        raise UserError(
            f"this generator knows {len(network.classes)} classes ({', '.join(network.classes[:3])}, ...) and reads no "
            "captions: give --labels"
        )
    own = network.text.encoder
    encoder = TextEncoder(replace(own, name=place) if place else own, precision)
    texts = [record["prompt"] for record in records]
    cut = encoder.tokenize(texts).cut
    report_cut([text for text, over in zip(texts, cut, strict=True) if over], len(texts), encoder, say)
    return Wanted(texts, Captions(encoder, [text for text in texts for _ in range(per)], negative), records)


def class_numbers(labels: list[str | int] | int | str | None, classes: list[str]) -> list[int]:
    """Class numbers of names or numbers given as text; None = every class.

    Raises:
        UserError: an unknown name or a number out of range.
    """
    if labels is None or labels == []:
        return list(range(len(classes)))
    numbers = []
    for label in map(str, labels if isinstance(labels, list) else [labels]):
        if label in classes:
            numbers.append(classes.index(label))
        elif label.isdecimal() and int(label) < len(classes):
            numbers.append(int(label))
        else:
            raise UserError(f"no class {label!r}: expected 0..{len(classes) - 1} or one of {', '.join(classes)}")
    return numbers


def _write_each(folder: Path, drawn: Tensor, wanted: Wanted, per: int) -> None:
    """Every picture as its own file: CLASS-0000.png, or 00000-0.png with a list of prompts beside them."""
    written: Counter[str] = Counter()  # by class: one that is named twice has twice as many pictures
    lines = []
    for number, (name, images) in enumerate(zip(wanted.names, drawn.split(per), strict=True)):
        files = []
        for index, image in enumerate(images):
            file = f"{number:05d}-{index}.png" if wanted.records else f"{name}-{written[name]:04d}.png"
            written[name] += 1
            write_bytes(folder / file, pictures.strip(image[None], gap=0))
            files.append(file)
        if wanted.records:
            lines.append(json.dumps(wanted.records[number] | {"pictures": files}, ensure_ascii=False))
    if lines:
        write_bytes(folder / PROMPTS, ("\n".join(lines) + "\n").encode())


def _short(name: str) -> str:
    return name if len(name) <= SHOWN else name[: SHOWN - 3] + "..."
