"""From the bytes of a picture to RGB, and what becomes of everything that is not an ordinary 8-bit picture.

    orientation tag        applied; what else EXIF holds is not looked at: an odd entry does not spoil a picture
    several frames         the first
    transparency           over white
    grey, palette, CMYK    expanded by Pillow
    16 bit                 65535 is white, whatever the picture's own range: v / 257
    float                  0 is black, 1 is white; values outside, NaN and infinity are refused
    32-bit integers        refused: nothing says which number is white

Whatever a decoder raises means that this picture cannot be read, never that a run ends.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from aligntok.errors import UserError

ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def decode(data: bytes) -> Image.Image:
    """An encoded picture as RGB.

    Raises:
        UserError: it cannot be read; the message is the reason in one line, the same in every run.
    """
    try:
        return to_rgb(Image.open(io.BytesIO(data)))
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes of them
        raise UserError(unreadable_because(error)) from error


def unreadable_because(error: BaseException) -> str:
    """The reason in one line, the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"  # its own words hold a memory address
    return " ".join(str(error).split()) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture -> RGB; see the module's docstring. Raises UserError where its numbers have no known white."""
    image.load()  # before its tags are asked for: Pillow looks for those of a PNG behind the pixels
    turn = _TURNS.get(orientation(image))
    image = _to_8_bit(image)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """The orientation tag, 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's parser raises many kinds; the pixels are fine all the same
        return 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits or of floats with 8 bits; others as they are."""
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))  # 16 bit there, too
    if not wide and image.mode not in ("I", "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    if wide:
        values = values / 65535
    elif image.mode == "I":
        raise UserError("32-bit integers, of which nothing says which is white: store 8 or 16 bits")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        low, high = np.nanmin(values, initial=np.inf), np.nanmax(values, initial=-np.inf)
        raise UserError(f"floats from {low:g} to {high:g}, NaN or infinity, expected 0 (black) to 1 (white)")
    return Image.fromarray(np.round(values * 255).astype(np.uint8))
