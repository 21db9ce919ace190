"""Text encoders of a few thousand random weights in folders as the hub has them: BERT, Qwen3, T5 and Gemma-2."""

from pathlib import Path

import torch

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "blue", "cat", "dog", "on", "the", "mat", "under", "sky"]
WIDTH, LAYERS = 32, 2
ENDS = {"bert": "[CLS] $A [SEP]", "qwen3": "$A", "t5": "$A [SEP]", "gemma2": "[CLS] $A"}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
CAUSAL = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def write_encoder(folder: Path, kind: str, seed: int = 0) -> Path:
    """A folder with model.safetensors, config.json and a tokenizer that pads on the wrong side."""
    _write(folder, kind, seed)
    return folder


def _write(folder: Path, kind: str, seed: int) -> None:
    import transformers as hf

    special = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    t5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4}
    makers = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES, max_position_embeddings=64, **special)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**CAUSAL, **special)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, **special, decoder_start_token_id=0)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**CAUSAL, **special)),
    }
    torch.manual_seed(seed)
    makers[kind]().save_pretrained(folder)
    _tokenizer(kind).save_pretrained(folder)


def _tokenizer(kind: str):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single=ENDS[kind], special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    if kind != "qwen3":
        names["bos_token"] = "[CLS]"
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)
