"""Headers: the size is Pillow's, and whatever DALI would see differently is Pillow's."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from photographs import encode, every_kind
from PIL import Image

from aligntok.data.decoding import to_rgb
from aligntok.data.headers import Header, read_header

KINDS = every_kind()
BY_PILLOW = {
    "cmyk.jpg": "CMYK",
    "turned-0.jpg": "an unusual orientation tag",
    "turned-xmp.jpg": "an unusual orientation tag",
    "turned.png": "EXIF or XMP in a PNG",
    "clear-palette.png": "transparency",
    "alpha.png": "transparency",
    "grey-alpha.png": "transparency",
    "deep.png": "16 bit",
    **{name: "neither JPEG nor PNG" for name in ("deep.tif", "animated.gif", "lossy.webp", "plain.bmp")},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_goes_where_it_is_decoded_right(name):
    found = read_header(KINDS[name])
    if name in BY_PILLOW:
        assert found == BY_PILLOW[name]
    else:
        assert found == Header(*to_rgb(Image.open(io.BytesIO(KINDS[name]))).size)


@pytest.mark.parametrize("name", ["baseline.jpg", "progressive.jpg", "turned-6.jpg", "colour.png", "palette.png"])
def test_a_truncated_file_is_never_given_to_dali(name):
    data = KINDS[name]
    for length in (0, 1, 3, 9, 30, len(data) // 2, len(data) - 20, len(data) - 5):
        assert isinstance(read_header(data[:length]), str)


@given(data=st.binary(max_size=300), start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]))
def test_junk_never_raises(data, start):
    assert isinstance(read_header(start + data), (str, Header))


def test_a_picture_beyond_pillows_limit_is_pillows_to_refuse(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert read_header(encode(Image.new("RGB", (8, 8)), "JPEG")) == "an extreme size"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_header(encode(Image.new("RGB", (8, 8)), "JPEG")) == Header(8, 8)
