"""LoRA on the encoder: nothing changes at first, little trains, and what is saved is a plain tokenizer."""

import sys

import pytest
import torch
from helpers import tiny_recipe, tiny_tokenizer, write_pictures

from aligntok.errors import UserError
from aligntok.models import lora
from aligntok.models.tokenizer import load_tokenizer
from aligntok.training.train_tokenizer import train_tokenizer

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def test_adding_changes_no_output_and_leaves_lora_as_all_that_trains():
    tokenizer = tiny_tokenizer()
    before = tokenizer.encoder(IMAGES)
    lora.add(tokenizer.encoder, rank=4)
    lora.train_only_lora(tokenizer.encoder.requires_grad_(True))
    assert torch.equal(tokenizer.encoder(IMAGES), before)
    trained = {name: p for name, p in tokenizer.encoder.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    widths = ((192, 576), (192, 192), (192, 768), (768, 192))  # of a ViT-Ti block: qkv, proj, fc1, fc2
    assert sum(p.numel() for p in trained.values()) == 2 * 4 * sum(map(sum, widths))


def test_merging_keeps_what_was_learned_in_plain_layers():
    tokenizer = tiny_tokenizer()
    keys, before = list(tokenizer.state_dict()), tokenizer.encoder(IMAGES)
    lora.add(tokenizer.encoder, rank=4)
    for name, parameter in tokenizer.encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    learned = tokenizer.encoder(IMAGES)
    lora.merge(tokenizer.encoder)
    assert list(tokenizer.state_dict()) == keys
    assert (learned - before).abs().max() > 0.01
    torch.testing.assert_close(tokenizer.encoder(IMAGES), learned, atol=1e-4, rtol=1e-4)


def test_an_encoder_without_lora_is_left_alone():
    tokenizer = tiny_tokenizer()
    lora.merge(tokenizer.encoder)
    lora.train_only_lora(tokenizer.encoder.requires_grad_(True))
    assert all(p.requires_grad for p in tokenizer.encoder.parameters())


def test_training_saves_a_tokenizer_that_loads_without_peft(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path / "run", write_pictures(tmp_path / "images"))
    recipe.tokenizer.model.encoder.lora_rank = 2
    trained = train_tokenizer(recipe)
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = load_tokenizer(tmp_path / "run" / "stage2" / "tokenizer")
    first = load_tokenizer(tmp_path / "run" / "stage1" / "tokenizer").encoder.backbone
    block, start = loaded.encoder.backbone.blocks[0], first.blocks[0]
    assert not torch.equal(block.attn.qkv.weight, start.attn.qkv.weight)  # trained through LoRA
    assert torch.equal(block.norm1.weight, start.norm1.weight)  # frozen
    assert torch.linalg.matrix_rank(block.attn.qkv.weight - start.attn.qkv.weight, atol=1e-5) <= 2
    assert list(loaded.state_dict()) == list(trained.state_dict())


@pytest.mark.parametrize(("rank", "message"), [(0, "expected a positive number"), (4, "peft cannot be imported")])
def test_mistakes_say_what_to_do(rank, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=message):
        lora.add(tiny_tokenizer().encoder, rank)


def test_a_missing_peft_is_said_before_a_picture_is_opened(tmp_path, monkeypatch):
    """And not when Stage 2 begins."""
    recipe = tiny_recipe(tmp_path / "run", tmp_path / "no pictures")
    recipe.tokenizer.model.encoder.lora_rank = 2
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'aligntok\[peft\]'"):
        train_tokenizer(recipe)
    recipe.tokenizer.stages.stage2.steps = 0  # nothing trains the encoder
    with pytest.raises(UserError, match="no pictures"):
        train_tokenizer(recipe)
