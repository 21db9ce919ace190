"""A loss of your own in Stage 1: edges of the reconstruction are to be those of the picture.

    python examples/another_loss.py --images embedded --steps 100

The objective of a stage is a class. This one adds a term to what it computes, and everything else stays what it is:
the loop, checkpoints, resuming, the guard, the log.
"""

import argparse

from torch import Tensor

import aligntok
from aligntok.config.from_dict import from_dict
from aligntok.config.recipes import read_recipe, recipe_path
from aligntok.data.sources import Batch
from aligntok.training.tokenizer_objective import TokenizerObjective
from aligntok.training.train_tokenizer import TokenizerTraining

WEIGHT = 0.5


def edges(images: Tensor) -> Tensor:
    """Differences of neighbours, down and to the right."""
    down, right = images[..., 1:, :-1] - images[..., :-1, :-1], images[..., :-1, 1:] - images[..., :-1, :-1]
    return abs(down) + abs(right)


class WithEdges(TokenizerObjective):
    """L + 0.5 |edges(x_hat) - edges(x)|."""

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        output, semantic, values = super()._forward(batch)
        loss = (edges(output) - edges(batch["images"])).abs().mean()
        return output, semantic + WEIGHT * loss, values | {"edges": loss.detach()}


class Training(TokenizerTraining):
    """The three stages with it."""

    objective = WithEdges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="embedded")
    parser.add_argument("--steps", type=int, default=100, help="of Stage 1; the others are left out")
    parser.add_argument("--output", default="runs/another_loss")
    parser.add_argument("--recipe", default="quickstart")
    options = parser.parse_args()

    recipe = from_dict(aligntok.Recipe, read_recipe(recipe_path(options.recipe)))
    recipe.output, recipe.data.path = options.output, options.images
    stages = recipe.tokenizer.stages
    stages.stage1.steps, stages.stage2.steps, stages.stage3.steps = options.steps, 0, 0
    stages.stage1.gan_start = options.steps // 2
    Training(recipe).run()


if __name__ == "__main__":
    main()
