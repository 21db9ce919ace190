"""Bytes to RGB: modes, depths, orientation tags that cannot be written back, and files that are damaged anywhere."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from aligntok.data.decoding import ORIENTATION, decode, to_rgb
from aligntok.errors import UserError

CASES = Path(__file__).parent / "cases"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Image.new("L", (4, 4), 100), (100, 100, 100)),
        (lambda: Image.new("RGBA", (4, 4), (200, 0, 0, 0)), (255, 255, 255)),
        (lambda: Image.new("RGBA", (4, 4), (200, 0, 0, 255)), (200, 0, 0)),
        (lambda: Image.new("LA", (4, 4), (50, 0)), (255, 255, 255)),
        (lambda: Image.new("1", (4, 4), 1), (255, 255, 255)),
        (lambda: Image.new("RGB", (4, 4), (1, 2, 3)).quantize(2), (1, 2, 3)),
        (lambda: Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (lambda: Image.fromarray(np.full((4, 4), 65535, np.uint16)), (255, 255, 255)),
        (lambda: Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), (100, 100, 100)),
        (lambda: Image.fromarray(np.full((4, 4), 1.0, np.float32)), (255, 255, 255)),
        (lambda: Image.fromarray(np.full((4, 4), 0.2, np.float32)), (51, 51, 51)),
    ],
)
def test_every_mode_becomes_rgb_over_white(make, expected):
    rgb = to_rgb(make())
    assert rgb.mode == "RGB"
    assert rgb.getpixel((1, 1)) == expected


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_the_same_picture_as_eight(kind):
    """Not stretched to its own range: a picture without black or white keeps its greys."""
    grey = np.random.default_rng(0).integers(60, 190, (9, 11)).astype(np.uint8)
    deep = decode(encoded(Image.fromarray(grey.astype(np.uint16) * 257), kind))
    plain = decode(encoded(Image.fromarray(grey), kind))
    assert np.array_equal(np.array(deep), np.array(plain))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 200.0])
def test_floats_of_no_known_white_are_refused(value):
    values = np.full((4, 4), 0.5, np.float32)
    values[2, 2] = value
    with pytest.raises(UserError, match=r"expected 0 \(black\) to 1 \(white\)"):
        decode(encoded(Image.fromarray(values), "TIFF"))


def test_thirty_two_bit_integers_are_refused():
    with pytest.raises(UserError, match="32-bit integers"):
        decode(encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"))


@pytest.mark.parametrize("turned", range(1, 9))
def test_the_orientation_is_applied_as_pillow_applies_it(turned):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ORIENTATION] = turned
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 8, 3)).astype(np.uint8))
    data = encoded(picture, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.array(decode(data)), np.array(expected))


@pytest.mark.parametrize("file", sorted((CASES / "exif").iterdir()), ids=lambda file: file.stem)
def test_an_odd_entry_of_exif_does_not_spoil_a_picture(file):
    """Pillow reads these tags and cannot write them back, which its own exif_transpose does."""
    data = file.read_bytes()
    stored = Image.open(io.BytesIO(data))
    turned = stored.getexif().get(ORIENTATION, 1)
    assert decode(data).size == (stored.size[::-1] if turned >= 5 else stored.size)


@pytest.mark.parametrize("file", sorted((CASES / "damaged").iterdir()), ids=lambda file: file.stem)
def test_files_that_made_pillow_raise_something_else(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decode(file.read_bytes()).mode == "RGB"
        except UserError as error:
            assert "\n" not in str(error)


def every_format() -> list[bytes]:
    """A small picture in every kind of file, with the tags that decoders read."""
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F], exif[0x011A] = 6, "maker", IFDRational(72, 1)
    grey, clear = colour.convert("L"), colour.convert("RGBA")
    files = [encoded(colour, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000")]
    files += [encoded(colour, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    files += [
        encoded(clear, "PNG"),
        encoded(clear, "WEBP", lossless=True),
        encoded(clear, "TIFF", compression="tiff_lzw"),
    ]
    files += [encoded(colour.convert("CMYK"), "JPEG"), encoded(colour.quantize(16), "PNG", transparency=3)]
    files += [encoded(Image.fromarray(np.array(grey).astype(np.uint16) * 200), kind) for kind in ("PNG", "TIFF")]
    files += [
        encoded(Image.fromarray(np.array(grey) / np.float32(255)), "TIFF"),
        encoded(colour, "JPEG", progressive=True),
    ]
    return files


def damage(data: bytes, chance: random.Random) -> bytes:
    """`data` with one to four faults: bytes changed, a part cut out, doubled, or the end missing."""
    broken = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(broken))
        match chance.randrange(5):
            case 0:
                broken[place] = chance.randrange(256)
            case 1:
                broken[place : place + 4] = chance.randbytes(4)
            case 2:
                del broken[place : place + chance.randint(1, 40)]
            case 3:
                broken[place:place] = broken[place : place + chance.randint(1, 40)]
            case 4:
                del broken[max(place, 1) :]
        broken = broken or bytearray(b"\0")
    return bytes(broken)


def test_ten_thousand_damaged_files_are_pictures_or_refused_in_one_line(capfd):
    chance, whole = random.Random(0), every_format()
    read = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(10_000):
            try:
                picture = decode(damage(whole[number % len(whole)], chance))
            except UserError as error:
                refused += 1
                assert str(error) and "\n" not in str(error)
            else:
                read += 1
                assert picture.mode == "RGB" and picture.tobytes()
    assert read > 1000 and refused > 1000
    capfd.readouterr()  # the libraries' own complaints
