"""Published weights in: reading a file, filling one of our tokenizers strictly, writing its folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from aligntok.errors import UserError
from aligntok.models.encoder_weights import read_tensors
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.zoo.ldm_keys import Names, translate_state

STATISTICS = {"latent_mean", "latent_std"}  # from the configuration: published files do not hold them


def read_published(source: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a torch file without executing anything that it holds."""
    if not Path(source).is_file():
        raise UserError(f"there is no file {source} to convert")
    return read_tensors(Path(source))


def write_converted(
    tokenizer: StoredTokenizer, state: dict[str, Tensor], names: Names, source: Path, output: Path
) -> None:
    """Fill `tokenizer` from tensors under their published names, save it to `output` and print what happened.

    Raises:
        UserError: missing, unexpected or misshapen tensors; nothing is written.
    """
    tokenizer.load_state_dict(translate_state(tokenizer, state, names, source, own=STATISTICS))
    tokenizer.eval().save(output)
    print(f"{source}: {len(state)} tensors, {sum(value.numel() for value in state.values()) / 1e6:.2f} M values")
    for name, part in tokenizer.named_children():
        count = sum(parameter.numel() for parameter in part.parameters())
        print(f"  {name:<12}{count / 1e6:10.3f} M parameters")
    print(
        f"{output}: {tokenizer.format}, {tokenizer.latent_channels} channels at f{tokenizer.downsample}, "
        f"fingerprint {tokenizer.fingerprint()}"
    )
