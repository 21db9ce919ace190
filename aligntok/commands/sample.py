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
from aligntok.evaluation.generation import check_pair, describe, stream_draw
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
ROWS = 100  # classes or prompts on the sheet where every picture has a file of its own


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
    texts = _texts(prompt, prompts)
    if texts is None and (negative or text_encoder):
        raise UserError("--negative and --text_encoder belong to captions: give --prompt or --prompts too")
    if texts is not None and labels not in (None, []):
        raise UserError("--labels and --prompt were both given: a generator draws classes or captions")
    precision = choose_precision(device)
    network, tok = Generator(generator), load_tokenizer(tokenizer).to(precision.device)
    check_pair(network, tok)
    telemetry = Telemetry(Path(output).parent, log_every=1)
    wanted = (
        _classes(network, labels, per_class)
        if texts is None
        else _captions(network, texts, negative, text_encoder, per_class, precision, telemetry.say)
    )
    overrides: dict[str, Any] = {"steps": steps, "guidance": guidance, "guidance_channels": guidance_channels}
    sampler = replace(network.sampler, **{k: v for k, v in overrides.items() if v is not None})
    if negative and sampler.guidance == 1.0:
        raise UserError(
            "--negative is what guidance leads away from, and guidance is 1, which is none: give --guidance 5"
        )
    each = Files(folder, wanted, per_class) if separate else None
    names = wanted.names if each is None else wanted.names[:ROWS]
    shown: list[Tensor] = []
    done, count = 0, len(wanted.asked)
    with telemetry.bar("sampling") as update:
        for images in stream_draw(network, tok, wanted.asked, sampler, precision, seed, size=size):
            if each is not None:
                each.write(images)
            shown += images[: len(names) * per_class - done] if done < len(names) * per_class else []
            done += len(images)
            update(done, count)
    if each is not None:
        each.finish()
        telemetry.say(f"{count} pictures in {folder}")
    write_bytes(output, pictures.grid(list(torch.stack(shown).split(per_class)), [_short(name) for name in names]))
    told = f"{count} pictures" if len(shown) == count else f"the first {len(shown)} of {count} pictures"
    telemetry.say(f"{output}: {told}; {describe(sampler)}, seed {seed}")


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
    asked = [*texts, *([negative] if negative else [])]
    cut = encoder.tokenize(asked).cut
    report_cut([text for text, over in zip(asked, cut, strict=True) if over], len(asked), encoder, say)
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


class Files:
    """Every picture as its own file, as it is drawn: CLASS-0000.png, or 00000-0.png with a list of prompts beside them.

    The list comes last: a folder without one is unfinished.
    """

    def __init__(self, folder: Path, wanted: Wanted, per: int) -> None:
        self.folder, self.wanted, self.per = folder, wanted, per
        self.written: Counter[str] = Counter()  # by class: one that is named twice has twice as many pictures
        self.files: list[str] = []
        (folder / PROMPTS).unlink(missing_ok=True)

    def write(self, images: Tensor) -> None:
        """The next pictures."""
        for image in images:
            number, index = divmod(len(self.files), self.per)
            name = self.wanted.names[number]
            file = f"{number:05d}-{index}.png" if self.wanted.records else f"{name}-{self.written[name]:04d}.png"
            self.written[name] += 1
            write_bytes(self.folder / file, pictures.strip(image[None], gap=0))
            self.files.append(file)

    def finish(self) -> None:
        """Write the list of prompts, where there are any."""
        lines = [
            json.dumps(record | {"pictures": self.files[self.per * i : self.per * (i + 1)]}, ensure_ascii=False)
            for i, record in enumerate(self.wanted.records)
        ]
        if lines:
            write_bytes(self.folder / PROMPTS, ("\n".join(lines) + "\n").encode())


def _short(name: str) -> str:
    return name if len(name) <= SHOWN else name[: SHOWN - 3] + "..."
