"""Latents of a folder of pictures in one file, and what the tokenizer makes of them again.

    python examples/encode_folder.py runs/quickstart/tokenizer ~/pictures latents.safetensors --size 64

For millions of pictures, with shards, resuming and several GPUs: `aligntok cache-latents`.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

import aligntok

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def crop(file: Path, size: int) -> torch.Tensor:
    """The square in the middle of a picture, [3, size, size] in [-1, 1]."""
    pixels = pil_to_tensor(Image.open(file).convert("RGB"))
    return center_crop(resize(pixels, size, antialias=True), [size, size]) / 127.5 - 1


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="a folder, or USER/NAME on the hub")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()

    precision = aligntok.choose_precision()
    tokenizer = aligntok.load_tokenizer(options.tokenizer).to(precision.device)
    files = sorted(file for file in options.pictures.rglob("*") if file.suffix.lower() in SUFFIXES)
    latents, errors = [], []
    for start in range(0, len(files), options.batch):
        images = torch.stack([crop(file, options.size) for file in files[start : start + options.batch]])
        images = images.to(precision.device)
        with precision.autocast():
            encoded = tokenizer.encode(images)
            decoded = tokenizer.decode(encoded)
        latents.append(encoded.float().cpu())
        errors.append((decoded.clamp(-1, 1) - images).square().mean((1, 2, 3)).cpu())
    save_file({"latents": torch.cat(latents).contiguous()}, options.output, {"tokenizer": tokenizer.fingerprint()})
    psnr = (10 * torch.log10(4 / torch.cat(errors))).mean()
    print(f"{options.output}: {len(files)} latents of {list(latents[0].shape[1:])}; PSNR through them {psnr:.2f} dB")


if __name__ == "__main__":
    main()
