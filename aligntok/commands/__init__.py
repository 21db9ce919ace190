"""What the commands do, one file each; training has its own (aligntok.training, aligntok.zoo, aligntok.study)."""
