"""What the first bytes of a picture say: its size, and whether DALI decodes it exactly as Pillow does.

JPEG (8 bit, one or three components, baseline or progressive) and PNG (8 bit, no transparency) are decoded alike; for
everything else `read_header` gives the reason why Pillow must do it. It never judges a file broken: Pillow does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from PIL import Image

ORIENTATION = 0x0112  # EXIF tag
_SOF = range(0xC0, 0xD0)  # start-of-frame markers, but for DHT, JPG and DAC
_NOT_SOF = {0xC4, 0xC8, 0xCC}
_HUFFMAN_DCT = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


@dataclass(frozen=True)
class Header:
    """Width and height in pixels, after the orientation tag has been applied."""

    width: int
    height: int


def read_header(data: bytes) -> Header | str:
    """The header of an encoded picture that DALI may decode, or why Pillow must."""
    try:
        if data[:3] == b"\xff\xd8\xff":
            header = _jpeg(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            header = _png(data)
        else:
            return "neither JPEG nor PNG"
    except (IndexError, struct.error):
        return "a header that ends early"
    if isinstance(header, str):
        return header
    if not 1 <= header.width * header.height <= (Image.MAX_IMAGE_PIXELS or float("inf")):
        return "an extreme size"
    return header


def _jpeg(data: bytes) -> Header | str:
    place, size, exif, xmp = 2, None, None, False
    while True:
        while data[place + 1] == 0xFF:  # fill bytes
            place += 1
        if data[place] != 0xFF:
            return "a damaged JPEG header"
        marker, (length,) = data[place + 1], struct.unpack_from(">H", data, place + 2)
        segment = place + 4
        if marker == 0xDA:  # the scans begin
            break
        if marker in _SOF and marker not in _NOT_SOF:
            precision, height, width, components = struct.unpack_from(">BHHB", data, segment)
            if marker not in _HUFFMAN_DCT or precision != 8:
                return "a rare kind of JPEG"
            if components not in (1, 3):
                return "CMYK"
            size = width, height
        elif marker == 0xE1 and data[segment : segment + 6] == b"Exif\0\0":
            if exif is not None:
                return "EXIF in several parts"
            exif = data[segment : place + 2 + length]
        elif marker == 0xE1:
            xmp |= b"tiff:Orientation" in data[segment : place + 2 + length]
        place += 2 + length
    if size is None:
        return "a damaged JPEG header"
    if data.rfind(b"\xff\xd9", place) < 0:
        return "a JPEG without end"  # DALI's decoder would fail with the whole batch
    orientation = None if exif is None else _orientation(exif)
    if orientation not in (None, *range(1, 9)) or (xmp and orientation is None):
        return "an unusual orientation tag"
    return Header(*reversed(size)) if orientation in (5, 6, 7, 8) else Header(*size)


def _orientation(exif: bytes) -> int | None:
    """The tag's value, None where there is none, 0 where the block cannot be read."""
    try:
        tags = Image.Exif()
        tags.load(exif)
        return tags.get(ORIENTATION)
    except Exception:  # Pillow's parser raises many kinds; what such a block means is then Pillow's to say
        return 0


def _png(data: bytes) -> Header | str:
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    start = data.find(b"IDAT")
    if data[12:16] != b"IHDR" or start < 0:
        return "a damaged PNG header"
    if data.find(b"IEND", start) < 0:
        return "a PNG without end"
    if depth == 16:
        return "16 bit"
    if colour in (4, 6) or data.find(b"tRNS", 0, start) >= 0:
        return "transparency"
    if any(mark in data for mark in _PNG_EXIF):
        return "EXIF or XMP in a PNG"
    return Header(width, height)
