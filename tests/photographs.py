"""Photographs that scikit-image and scikit-learn carry, as files of many kinds."""

import io
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

SIZES = ((500, 375), (375, 500), (333, 501), (640, 427), (257, 255), (300, 900), (611, 613), (90, 70), (1111, 901))


def photographs() -> list[Image.Image]:
    arrays = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.chelsea()]
    arrays += [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    return [Image.fromarray(array) for array in arrays]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_photographs(folder: Path) -> Path:
    """One JPEG of every size: landscape, portrait, odd, long, smaller and much larger than a crop."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = photographs()
    for number, size in enumerate(SIZES):
        data = encode(pictures[number % len(pictures)].resize(size, Image.Resampling.LANCZOS), "JPEG", quality=92)
        (folder / f"{number:02d}.jpg").write_bytes(data)
    return folder


def every_kind() -> dict[str, bytes]:
    """One photograph in every kind of file that needs care."""
    colour = photographs()[0].resize((101, 77), Image.Resampling.LANCZOS)
    grey = colour.convert("L")
    clear = colour.copy()
    clear.putalpha(grey)
    deep = Image.fromarray(np.array(grey).astype(np.uint16) * 200)
    palette = colour.quantize(32)
    kinds = {
        "baseline.jpg": encode(colour, "JPEG"),
        "progressive.jpg": encode(colour, "JPEG", progressive=True),
        "full-chroma.jpg": encode(colour, "JPEG", subsampling=0),
        "rgb.jpg": encode(colour, "JPEG", keep_rgb=True),
        "grey.jpg": encode(grey, "JPEG"),
        "cmyk.jpg": encode(colour.convert("CMYK"), "JPEG"),
        "trailing.jpg": encode(colour, "JPEG") + b"\0" * 99,
        "colour.png": encode(colour, "PNG"),
        "grey.png": encode(grey, "PNG"),
        "one-bit.png": encode(grey.convert("1"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "clear-palette.png": encode(palette, "PNG", transparency=3),
        "alpha.png": encode(clear, "PNG"),
        "grey-alpha.png": encode(clear.convert("LA"), "PNG"),
        "deep.png": encode(deep, "PNG"),
        "deep.tif": encode(deep, "TIFF"),
        "animated.gif": encode(colour, "GIF"),
        "lossy.webp": encode(colour, "WEBP"),
        "plain.bmp": encode(colour, "BMP"),
    }
    for orientation in (0, *range(1, 9)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        kinds[f"turned-{orientation}.jpg"] = encode(colour, "JPEG", exif=exif)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds["turned.png"] = encode(colour, "PNG", exif=exif)
    kinds["turned-xmp.jpg"] = encode(colour, "JPEG", xmp=b'<x tiff:Orientation="6"/>')
    return kinds
