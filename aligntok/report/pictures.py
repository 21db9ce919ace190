"""Pictures of a run: tensors in [-1, 1] to PNG bytes, in rows, grids and colour maps of tokens.

The same tensor always gives the same bytes. Every function takes images [n, 3, H, W] in [-1, 1] and clamps
what lies outside. `pca_colors` shows what a space of C channels holds: with tokens x_i and the three leading
eigenvectors V of their covariance, the colour of token i is the robustly scaled s_i = (x_i - mean) V.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from aligntok.errors import UserError

INK, PAPER, MUTED = (27, 29, 33), (255, 255, 255), (93, 99, 110)  # the light colours of page.css
SHEET_SIDES = (128, 96, 64, 48, 32)  # px of the longer side of a contact sheet's pictures, tried in this order
ROBUST_RANGE = (
    0.02,
    0.98,
)  # quantiles stretched to black and white: a few outlier tokens must not set the scale


def check_images(images: Tensor, what: str) -> Tensor:
    """Return `images` if they are finite and [n, 3, H, W]; raise UserError naming `what` otherwise."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UserError(f"{what}: got a tensor of shape {tuple(images.shape)}, expected images [n, 3, H, W]")
    if not images.is_floating_point():
        raise UserError(f"{what}: got {images.dtype}, expected floating point images in [-1, 1]")
    bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
    if bad:
        raise UserError(
            f"{what}: {bad} of {len(images)} images hold NaN or infinity; see the training log for the cause"
        )
    return images


def to_uint8(images: Tensor) -> Tensor:
    """Images [n, 3, H, W] in [-1, 1] to bytes [n, H, W, 3], clamped and rounded, on the CPU."""
    images = check_images(images, "pictures").detach().float().cpu()
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def preview(images: Tensor, limit: int = 128) -> Tensor:
    """Shrink images whose longer side exceeds `limit` pixels, with antialiasing; leave smaller ones alone."""
    height, width = check_images(images, "pictures").shape[-2:]
    if max(height, width) <= limit:
        return images
    factor = limit / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return torch.nn.functional.interpolate(images.float(), size, mode="bicubic", antialias=True)


def png(image: Image.Image) -> bytes:
    """Encode without a time stamp or any other metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _tiles(images: Tensor, scale: int) -> list[Image.Image]:
    tiles = [Image.fromarray(tile.numpy()) for tile in to_uint8(images)]
    if scale == 1:
        return tiles
    return [tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.BICUBIC) for tile in tiles]


def strip(images: Tensor, gap: int = 4) -> bytes:
    """One row of pictures at their own size with transparent gaps, for a page that has its own background."""
    tiles = _tiles(images, 1)
    width = sum(tile.width for tile in tiles) + gap * (len(tiles) - 1)
    sheet = Image.new("RGBA", (width, tiles[0].height), (0, 0, 0, 0))
    for column, tile in enumerate(tiles):
        sheet.paste(tile, (column * (tile.width + gap), 0))
    return png(sheet)


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def sheet(
    rows: Sequence[Tensor],
    row_labels: Sequence[str],
    scale: int = 2,
    headings: Mapping[int, Sequence[str]] | None = None,
    gap: int = 4,
) -> Image.Image:
    """Labelled rows of pictures on white.

    Row i shows `rows[i]` [n_i, 3, H, W] to the right of `row_labels[i]`; `headings[i]` names the columns from
    row i on, in a line above it. Rows may differ in length but not in picture size. Labels longer than two
    pictures and a half, and headings wider than one, are cut with dots.
    """
    if not rows or len(rows) != len(row_labels):
        raise UserError(f"picture grid: got {len(rows)} rows and {len(row_labels)} labels, expected one label per row")
    sizes = {
        tuple(check_images(row, label or "picture grid").shape[-2:])
        for row, label in zip(rows, row_labels, strict=True)
    }
    if len(sizes) > 1:
        raise UserError(f"picture grid: rows of different picture sizes {sorted(sizes)}; resize them first")
    height, width = (side * scale for side in sizes.pop())
    font = ImageFont.load_default(size=max(10, min(26, height / 5)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # what a size gives
    labels = [_shorten(label, font, int(2.5 * width)) for label in row_labels]
    margin, line, headings = 3 * gap, int(2 * font.size), headings or {}
    left = margin + math.ceil(max(font.getlength(label) for label in labels)) + (margin if any(labels) else 0)
    columns = max(len(row) for row in rows)
    total = 2 * margin + len(rows) * (height + gap) - gap + len(headings) * line
    image = Image.new("RGB", (left + columns * (width + gap) - gap + margin, total), PAPER)
    draw, y = ImageDraw.Draw(image), margin - height - gap
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y += height + gap
        if index in headings:
            y += line
            for column, heading in enumerate(headings[index][:columns]):
                middle = left + column * (width + gap) + width // 2
                draw.text((middle, y - 2 * gap), _shorten(heading, font, width), font=font, fill=MUTED, anchor="ms")
        draw.text((margin, y + height // 2), label, font=font, fill=INK, anchor="lm")
        for column, tile in enumerate(_tiles(row, scale)):
            image.paste(tile, (left + column * (width + gap), y))
    return image


def grid(
    rows: Sequence[Tensor],
    row_labels: Sequence[str],
    scale: int = 2,
    headings: Mapping[int, Sequence[str]] | None = None,
    gap: int = 4,
) -> bytes:
    """`sheet` as PNG bytes."""
    return png(sheet(rows, row_labels, scale, headings, gap))


def by_class(samples: Tensor, classes: Sequence[str], columns: int | None = None) -> list[Tensor]:
    """Split class-major samples [classes * k, 3, H, W] into one [min(k, columns), 3, H, W] row per class."""
    check_images(samples, "samples")
    if not classes or len(samples) % len(classes):
        raise UserError(
            f"samples: {len(samples)} pictures do not divide into {len(classes)} classes; "
            "expected the same number for each, in the order of the classes"
        )
    return [row[:columns] for row in samples.chunk(len(classes))]


def pca_colors(tokens: Tensor, grid: tuple[int, int], reference: Tensor | None = None) -> Tensor:
    """Colour maps [n, 3, h, w] in [-1, 1] from the three leading principal components of tokens [n, h*w, C].

    The components are fitted over all tokens of the set in float64. Without `reference` each is given the
    sign that makes its largest loading positive. With `reference`, an earlier result for the same pictures
    and grid, the three standardised components are turned by the orthogonal map that correlates best with it
    (Procrustes), because their order, sign and mixture are arbitrary and two spaces would look different
    where they agree. Each channel's 2-98 % range is stretched to [-1, 1]; a component without variance gives
    grey.
    """
    if tokens.ndim != 3 or 0 in tokens.shape or tokens.shape[1] != grid[0] * grid[1]:
        raise UserError(
            f"PCA: got tokens of shape {tuple(tokens.shape)} for a grid of {grid[0]}x{grid[1]}; "
            f"expected [n, {grid[0] * grid[1]}, channels]"
        )
    if not torch.isfinite(tokens).all():
        raise UserError("PCA: the tokens hold NaN or infinity; see the training log for the cause")
    scores = _principal_scores(tokens.detach().cpu().double().flatten(0, 1))  # [n*N, 3]
    if reference is not None:
        expected = (tokens.shape[0], 3, *grid)
        if tuple(reference.shape) != expected:
            raise UserError(f"PCA: got a reference of shape {tuple(reference.shape)}, expected {expected}")
        target = _standardise(reference.double().cpu().permute(0, 2, 3, 1).reshape(-1, 3))
        left, _, right = torch.linalg.svd(scores.T @ target)
        scores = scores @ (left @ right)
    quantiles = torch.tensor(ROBUST_RANGE, dtype=scores.dtype)
    low, high = torch.quantile(scores, quantiles, dim=0)
    span = high - low
    colors = torch.where(span > 1e-9, (scores - low) / span.clamp_min(1e-9), torch.full_like(scores, 0.5))
    return (colors.clamp(0, 1) * 2 - 1).float().view(len(tokens), *grid, 3).permute(0, 3, 1, 2).contiguous()


def _standardise(values: Tensor) -> Tensor:
    """Zero mean and unit variance per column; columns of zeros stay as they are."""
    values = values - values.mean(0)
    deviation = values.square().mean(0).sqrt()
    return values / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def _principal_scores(values: Tensor) -> Tensor:
    """Standardised scores [m, 3] of rows [m, C] on the leading components; missing components are zero."""
    rounding = 1e-9 * values.norm()  # what centring leaves of a constant, generously
    values = values - values.mean(0)
    _, singular, directions = torch.linalg.svd(values, full_matrices=False)
    directions = directions[:3]  # [<=3, C]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    scores = values @ (directions * largest.sign()).T  # [m, <=3]
    scores = torch.where(singular[:3] > rounding, scores, torch.zeros_like(scores))
    return _standardise(torch.nn.functional.pad(scores, (0, 3 - scores.shape[1])))


def latent_tokens(latents: Tensor) -> Tensor:
    """Latents [n, d, h, w] as tokens [n, h*w, d], row-major."""
    if latents.ndim != 4:
        raise UserError(f"PCA: got latents of shape {tuple(latents.shape)}, expected [n, channels, h, w]")
    return latents.flatten(2).transpose(1, 2)


def upscale(maps: Tensor, size: tuple[int, int], blend: Tensor | None = None, weight: float = 0.6) -> Tensor:
    """Nearest-neighbour enlargement of maps [n, 3, h, w] to `size`; with `blend`, mixed over those images.

    `weight` is the share of the map where it is mixed: 1 hides the image.
    """
    enlarged = torch.nn.functional.interpolate(check_images(maps, "colour maps"), size, mode="nearest-exact")
    if blend is None:
        return enlarged
    if blend.shape != enlarged.shape:
        raise UserError(f"colour maps: {tuple(enlarged.shape)} cannot be mixed with images {tuple(blend.shape)}")
    return weight * enlarged + (1 - weight) * blend.to(enlarged)


def contact_sheet(
    reconstructions: Mapping[str, Tensor],
    samples: Tensor | None = None,
    classes: Sequence[str] = ("all",),
    columns: int = 12,
    sample_rows: int = 4,
    limit: int = 400_000,
) -> bytes:
    """One PNG for a README: rows of reconstructions above rows of samples with one class per column.

    `reconstructions` holds label -> images [n, 3, H, W], `samples` is class by class. Returned is the first
    of these that stays within `limit` bytes: true colours, then 256 dithered colours, at twice the size of
    the pictures; the same at their own size; the same again of smaller ones. Raises UserError if none does.
    """
    first = min(SHEET_SIDES[0], *(max(images.shape[-2:]) for images in reconstructions.values()))
    for side in (first, *(side for side in SHEET_SIDES if side < first)):
        small = None if samples is None else preview(samples, side)
        rows = {label: preview(images[:columns], side) for label, images in reconstructions.items()}
        for image in _sheets(rows, small, classes, columns, sample_rows):
            dithered = image.quantize(palette=image.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
            for version in (image, dithered):
                data = png(version)
                if len(data) <= limit:
                    return data
    raise UserError(f"contact sheet: {len(data):,} bytes even in 256 colours, above the limit of {limit:,}; show less")


def _sheets(
    reconstructions: Mapping[str, Tensor],
    samples: Tensor | None,
    classes: Sequence[str],
    columns: int,
    sample_rows: int,
) -> Iterator[Image.Image]:
    """The contact sheet at twice the size of its pictures, then at their own."""
    rows, labels, headings = list(reconstructions.values()), list(reconstructions), {}
    if samples is not None:
        shown = torch.stack(by_class(samples, classes), dim=1)  # [k, classes, 3, H, W]
        if len(classes) == 1:
            shown = torch.stack(shown.flatten(0, 1).split(columns)[: max(1, len(shown) // columns)])
        else:
            headings = {len(rows): list(classes[:columns])}
        rows += list(shown[:sample_rows, :columns])
        labels += ["Samples"] + [""] * (min(sample_rows, len(shown)) - 1)
    for scale in (2, 1):
        yield sheet(rows, labels, scale, headings)
