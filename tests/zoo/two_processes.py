"""What each of two processes runs for test_distributed_rivals.py. Arguments: pictures, OUTPUT."""

import sys
from pathlib import Path

import torch
from zoo_rivals import KINDS, rival_recipe

from aligntok.training import distributed
from aligntok.zoo.train_rival import train_rival


def run(pictures: Path, output: Path) -> None:
    """All kinds, one after the other."""
    for kind in KINDS:
        train_rival(rival_recipe(output / kind, pictures, kind))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.start("cpu"):
        run(*map(Path, sys.argv[1:]))
