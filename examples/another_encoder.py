"""Another vision transformer as the encoder: any ViT of timm, by its name.

    python examples/another_encoder.py vit_base_patch16_siglip_256.v2_webli --channels 32
    python examples/another_encoder.py vit_tiny_patch16_224.augreg_in21k --weights random --train ~/pictures

Without --train it builds the tokenizer and prints its parts; with it, the three stages run at a small size, as
`aligntok train-tokenizer` would run them from a recipe with `tokenizer.model.encoder.name`.
"""

import argparse

import torch

import aligntok
from aligntok.config import AdapterConfig, DecoderConfig, EncoderConfig, TokenizerConfig
from aligntok.training.train_tokenizer import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="timm's name")
    parser.add_argument("--weights", default="pretrained", help="pretrained (downloads), random, or a file")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--train", default=None, metavar="PICTURES")
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    parser.add_argument("--output", default="runs/another_encoder")
    options = parser.parse_args()

    small = DecoderConfig(base_channels=32, channel_multipliers=(1, 1, 2, 2, 4), blocks=1, groups=8)
    config = TokenizerConfig(
        encoder=EncoderConfig(name=options.encoder, weights=options.weights),
        adapter=AdapterConfig(latent_channels=options.channels),
        decoder=DecoderConfig() if options.train is None else small,
    )
    if options.train is None:
        with torch.device("meta"):
            config.encoder.weights = "random"
            tokenizer = aligntok.AlignTok(config)
        for name, part in tokenizer.named_children():
            print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters")
        return
    recipe = aligntok.Recipe(output=options.output)
    recipe.data.path, recipe.data.image_size = options.train, 64
    recipe.tokenizer.model = config
    recipe.tokenizer.losses.perceptual.kind = "st-lpips-alex"
    recipe.tokenizer.training.batch_size = 8
    for stage in (recipe.tokenizer.stages.stage1, recipe.tokenizer.stages.stage2, recipe.tokenizer.stages.stage3):
        stage.steps, stage.gan_start = options.steps, options.steps // 2
    train_tokenizer(recipe)


if __name__ == "__main__":
    main()
