"""`aligntok push`: a tokenizer's or a generator's folder becomes a repository on the Hugging Face hub, with a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aligntok.config.options import PushConfig
from aligntok.errors import UserError
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import AlignTok, StoredTokenizer, load_tokenizer
from aligntok.runtime.hub import NAME
from aligntok.runtime.manifest import FILES, Manifest
from aligntok.runtime.weights import in_short

PAPER = "https://arxiv.org/abs/2509.25162"
CARD = "README.md"
# Of pretrained encoders, by the beginning of timm's name: what their publishers ask of weights made from them
LICENCES = {
    "vit_small_patch14_dinov2": "Apache-2.0",
    "vit_base_patch14_dinov2": "Apache-2.0",
    "vit_large_patch14_dinov2": "Apache-2.0",
    "vit_giant_patch14_dinov2": "Apache-2.0",
    "vit_base_patch16_siglip": "Apache-2.0",
    "vit_large_patch16_siglip": "Apache-2.0",
    "vit_base_patch16_224.mae": "CC-BY-NC-4.0",
    "vit_large_patch16_224.mae": "CC-BY-NC-4.0",
}


def push(options: PushConfig) -> str:
    """Check the folder, write its card, upload; returns what to report.

    Raises:
        UserError: a folder or a file of metrics that cannot be read, a name that is none, and what the hub refuses.
    """
    if not NAME.fullmatch(options.name):
        raise UserError(f"{options.name!r} is no name of a repository: expected USER/NAME")
    card = card_of(options)
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(options.name, private=options.private, exist_ok=True)
        if options.revision is not None:
            api.create_branch(options.name, branch=options.revision, exist_ok=True)
        place: dict[str, Any] = {"repo_id": options.name, "revision": options.revision}
        api.upload_folder(
            folder_path=options.folder, allow_patterns=list(FILES), commit_message=options.message, **place
        )
        api.upload_file(
            path_or_fileobj=card.encode(), path_in_repo=CARD, commit_message=f"Card: {options.message}", **place
        )
    except Exception as error:  # network, authorisation, names: each has its own
        raise UserError(
            f"{options.name} could not be written to the hub ({in_short(error)}): check the network, and that "
            "`hf auth login` or HF_TOKEN gives you access"
        ) from error
    at = f"@{options.revision}" if options.revision else ""
    return f"{options.folder} is {options.name}{at} on the hub: give that name where a folder is asked for"


def card_of(options: PushConfig) -> str:
    """The repository's README: what it is, how it is used, what is known of it.

    Raises:
        UserError: the folder or a file of metrics cannot be read.
    """
    if Manifest(options.folder, "tokenizer or generator").format == "aligntok.generator":
        body, tags = _of_generator(options, Generator(options.folder)), ["image-generation", "flow-matching"]
    else:
        body, tags = _of_tokenizer(options, load_tokenizer(options.folder)), ["image-tokenizer", "autoencoder"]
    head = ["---", "library_name: aligntok", f"tags: [{', '.join(['aligntok', *tags])}]"]
    head += [f"license: {options.license}"] if options.license else []
    parts = ["\n".join([*head, "---"]), *body, *_data(options), *_metrics(options.metrics)]
    return "\n\n".join([*parts, f"The method: [AlignTok]({PAPER}), ICLR 2026."]) + "\n"


def _of_tokenizer(options: PushConfig, tokenizer: StoredTokenizer) -> list[str]:
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    parts = ", ".join(f"{name} {size / 1e6:.2f} M" for name, size in sizes.items() if size)
    told = (
        f"An image tokenizer (`{tokenizer.format}`): {tokenizer.latent_channels} channels, one latent cell for "
        f"{tokenizer.downsample} x {tokenizer.downsample} pixels. Parameters: {parts}. Generators know it by its "
        f"fingerprint `{tokenizer.fingerprint()}`."
    )
    if isinstance(tokenizer, AlignTok):
        name = tokenizer.config.encoder.name
        licence = next((told for start, told in LICENCES.items() if name.startswith(start)), None)
        told += f" Its encoder was made from `{name}` of timm"
        told += f", whose weights are {licence}." if licence else ": see there for the licence of its weights."
    used = (
        "```python\nimport aligntok\n\n"
        f'tokenizer = aligntok.load_tokenizer("{options.name}")\n'
        "latents = tokenizer.encode(images)  # [B, 3, H, W] in [-1, 1]\n"
        "images = tokenizer.decode(latents)\n```"
    )
    return [f"# {options.name.partition('/')[2]}", told, used, *_recipe(options)]


def _of_generator(options: PushConfig, generator: Generator) -> list[str]:
    size = sum(p.numel() for p in generator.model.parameters()) / 1e6
    latents = "x".join(str(side) for side in generator.latent_shape)
    few = ", ".join(generator.classes[:5]) + (", ..." if len(generator.classes) > 5 else "")
    what, asked = f"{len(generator.classes)} classes ({few})", "--labels 0"
    if generator.text is not None:
        what, asked = f"captions, through the text encoder `{generator.text.encoder.name}`", "--prompt 'a red fox'"
    told = (
        f"A {type(generator.model).__name__} of {size:.2f} M parameters on latents of {latents}, asked by {what}. It "
        f"belongs to the tokenizer with the fingerprint `{generator.tokenizer_fingerprint}`."
    )
    used = f"```\naligntok sample --generator {options.name} --tokenizer TOKENIZER {asked} --output pictures.png\n```"
    return [f"# {options.name.partition('/')[2]}", told, used, *_recipe(options)]


def _recipe(options: PushConfig) -> list[str]:
    values = Manifest(options.folder, "tokenizer or generator").values["config"]
    return [f"## Configuration\n\n```json\n{json.dumps(values, indent=1)}\n```"]


def _data(options: PushConfig) -> list[str]:
    return [f"## Data\n\nTrained on {options.data}."] if options.data else []


def _metrics(files: list[str] | None) -> list[str]:
    """Tables of what `aligntok evaluate --output` has written, each number with its protocol."""
    found = []
    for file in files or []:
        try:
            measured = json.loads(Path(file).read_text())
            for name, numbers in measured.items():
                values = "\n".join(f"| {key} | {value:.4f} |" for key, value in numbers["values"].items())
                found.append(f"### {name}\n\n| metric | value |\n|---|---|\n{values}\n\n{numbers['protocol']}")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"--metrics {file} cannot be read ({in_short(error)}): give what aligntok evaluate --output has written"
            ) from error
    return ["## Metrics", *found] if found else []
