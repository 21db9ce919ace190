"""The Triton kernels of `group_norm_silu`: channels-last memory [B, P, C], with P = H * W pixels.

A group of a small map fits one program, which reads it once: `whole_kernel`, `whole_backward_kernel`. A larger map
takes three launches each way, with sums over strips of pixels in between:

    forward    statistics_kernel   mean and sum of squared deviations of every channel of a strip    reads x
               merge_kernel        mean and 1 / deviation of every group                             reads the partials
               apply_kernel        y                                                                 reads x
    backward   sums_kernel         sum gu and sum gu * xhat of every channel of a strip              reads x, dy
               terms_kernel        their sums over an image; means of weight * sum over a group      reads the partials
               dx_kernel           dx = rstd * (weight * gu - term0 - xhat * term1)                  reads x, dy

with gu = dy * dy/du. Sums of x are taken around a value or a mean of some of the values that are added up, so that a
mean far larger than the deviation costs no digits. Every sum has a fixed order.

A program of the kernels that read x works on tiles of ROWS pixels and CHANNELS channels: statistics_kernel and
sums_kernel on a strip of STEPS tiles, two of them in flight at a time; apply_kernel and dx_kernel on one tile.
"""

from ._triton import tl, triton


@triton.jit
def _tile(P, C, PIXELS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a program with PIXELS pixels: its strip (counted over all images), image, channels, where it starts, how many
    pixels of the image are left from there; rows and offsets of its first tile. Programs that share rows are
    neighbours."""
    blocks = tl.cdiv(C, CHANNELS)
    strips = tl.cdiv(P, PIXELS)
    strip = tl.program_id(0) // blocks
    image = (strip // strips).to(tl.int64)
    first = strip % strips * PIXELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)
    offset = row[:, None] * C + channel[None, :]
    return strip.to(tl.int64), image, channel, (image * P + first) * C, P - first, row, offset


@triton.jit
def _group_tile(P, C, WIDTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The image and channels of a program that has a group to itself; start, offsets and mask of its tile."""
    groups = C // WIDTH
    image = (tl.program_id(0) // groups).to(tl.int64)
    lane = tl.arange(0, LANES)
    row = tl.arange(0, ROWS)
    channel = tl.program_id(0) % groups * WIDTH + lane
    offset = row[:, None] * C + channel[None, :]
    inside = (row < P)[:, None] & (lane < WIDTH)[None, :]
    return image, channel, lane < WIDTH, image * P * C, offset, inside


@triton.jit
def _of_channels(values, channel, known):
    """One fp32 value per channel, as a row that broadcasts over the pixels of a tile."""
    return tl.load(values + channel, mask=known, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _activated(u, ACTIVATION: tl.constexpr):
    if ACTIVATION:
        u = u * tl.sigmoid(u)
    return u


@triton.jit
def _before_activation(dy, u, ACTIVATION: tl.constexpr):
    """gu = dy * dy/du."""
    if ACTIVATION:
        s = tl.sigmoid(u)
        dy = dy * s * (1 + u * (1 - s))
    return dy


@triton.jit
def whole_kernel(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    P,
    C,
    eps,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    _, channel, known, start, offset, inside = _group_tile(P, C, WIDTH, ROWS, LANES)
    tile = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32)  # [ROWS, LANES]
    count = 1.0 * P * WIDTH
    one = tl.load(x + start + tl.program_id(0) % (C // WIDTH) * WIDTH).to(tl.float32)
    centre = one + tl.sum(tl.where(inside, tile - one, 0.0)) / count
    deviation = tl.where(inside, tile - centre, 0.0)
    scale = tl.rsqrt(tl.sum(deviation * deviation) / count + eps)
    u = deviation * scale * _of_channels(weight, channel, known) + _of_channels(bias, channel, known)
    tl.store(y + start + offset, _activated(u, ACTIVATION), mask=inside)
    tl.store(mean + tl.program_id(0), centre)
    tl.store(rstd + tl.program_id(0), scale)


@triton.jit
def whole_backward_kernel(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    dx,
    sums,
    P,
    C,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    image, channel, known, start, offset, inside = _group_tile(P, C, WIDTH, ROWS, LANES)
    w = _of_channels(weight, channel, known)
    scale = tl.load(rstd + tl.program_id(0))
    xhat = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + tl.program_id(0))
    xhat *= scale
    upstream = tl.load(dy + start + offset, mask=inside, other=0.0).to(tl.float32)
    gu = _before_activation(upstream, xhat * w + _of_channels(bias, channel, known), ACTIVATION)
    sum0, sum1 = tl.sum(gu, 0), tl.sum(gu * xhat, 0)  # [LANES]
    target = sums + image * 2 * C + channel
    tl.store(target, sum0, mask=known)
    tl.store(target + C, sum1, mask=known)
    row = tl.reshape(w, [LANES])
    count = 1.0 * P * WIDTH
    term0, term1 = tl.sum(row * sum0) / count, tl.sum(row * sum1) / count
    tl.store(dx + start + offset, scale * (w * gu - term0 - xhat * term1), mask=inside)


@triton.jit
def statistics_kernel(x, partials, P, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    strip, _, channel, start, left, row, offset = _tile(P, C, ROWS * STEPS, ROWS, CHANNELS)
    known = channel < C
    first = tl.load(x + start + offset, mask=(row < left)[:, None] & known[None, :], other=0.0).to(tl.float32)
    centre = tl.sum(first, 0) / tl.minimum(left, ROWS)
    sums, squares = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in tl.range(STEPS, loop_unroll_factor=2):
        inside = (row < left - step * ROWS)[:, None] & known[None, :]
        tile = tl.load(x + (start + step * ROWS * C) + offset, mask=inside, other=0.0).to(tl.float32)
        off = tl.where(inside, tile - centre[None, :], 0.0)
        sums += off
        squares += off * off
    # `centre` is the mean of one tile out of STEPS: whatever the data are, pixels * shift^2 is at most STEPS times the
    # squared deviations, and so the difference below multiplies rounding errors by STEPS + 1 at most.
    total = tl.sum(sums, 0)
    shift = total / tl.minimum(left, ROWS * STEPS)
    target = partials + strip * 2 * C + channel  # [B * strips, 2, C]
    tl.store(target, centre + shift, mask=known)
    tl.store(target + C, tl.sum(squares, 0) - total * shift, mask=known)


@triton.jit
def merge_kernel(partials, mean, rstd, P, C, eps, WIDTH: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    strips = tl.cdiv(P, PIXELS)
    groups = C // WIDTH
    source = partials + (tl.program_id(0) // groups).to(tl.int64) * strips * 2 * C + tl.program_id(0) % groups * WIDTH
    one = tl.load(source)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, strips * WIDTH, BLOCK):
        index = start + tl.arange(0, BLOCK)
        strip, inside = index // WIDTH, index < strips * WIDTH
        values = tl.load(source + strip.to(tl.int64) * 2 * C + index % WIDTH, mask=inside, other=0.0)
        pixels = tl.minimum(P - strip * PIXELS, PIXELS)
        sums += tl.where(inside, pixels * (values - one), 0.0)
    count = 1.0 * P * WIDTH
    centre = one + tl.sum(sums) / count
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, strips * WIDTH, BLOCK):
        index = start + tl.arange(0, BLOCK)
        strip, inside = index // WIDTH, index < strips * WIDTH
        place = source + strip.to(tl.int64) * 2 * C + index % WIDTH
        off = tl.load(place, mask=inside, other=0.0) - centre
        pixels = tl.minimum(P - strip * PIXELS, PIXELS)
        squares += tl.where(inside, tl.load(place + C, mask=inside, other=0.0) + pixels * off * off, 0.0)
    tl.store(mean + tl.program_id(0), centre)
    tl.store(rstd + tl.program_id(0), tl.rsqrt(tl.sum(squares) / count + eps))


@triton.jit
def apply_kernel(
    x,
    weight,
    bias,
    mean,
    rstd,
    y,
    P,
    C,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, image, channel, start, left, row, offset = _tile(P, C, ROWS, ROWS, CHANNELS)
    known = channel < C
    inside = (row < left)[:, None] & known[None, :]
    group = image * (C // WIDTH) + channel // WIDTH
    centre, scale = _of_channels(mean, group, known), _of_channels(rstd, group, known)
    scale *= _of_channels(weight, channel, known)
    tile = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32)
    u = (tile - centre) * scale + _of_channels(bias, channel, known)
    tl.store(y + start + offset, _activated(u, ACTIVATION), mask=inside)


@triton.jit
def sums_kernel(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    partials,
    P,
    C,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    strip, image, channel, start, left, row, offset = _tile(P, C, ROWS * STEPS, ROWS, CHANNELS)
    known = channel < C
    group = image * (C // WIDTH) + channel // WIDTH
    centre, scale = _of_channels(mean, group, known), _of_channels(rstd, group, known)
    w, b = _of_channels(weight, channel, known), _of_channels(bias, channel, known)
    sums0, sums1 = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in tl.range(STEPS, loop_unroll_factor=2):
        inside = (row < left - step * ROWS)[:, None] & known[None, :]
        place = start + step * ROWS * C
        xhat = (tl.load(x + place + offset, mask=inside, other=0.0).to(tl.float32) - centre) * scale
        upstream = tl.load(dy + place + offset, mask=inside, other=0.0).to(tl.float32)
        gu = _before_activation(upstream, xhat * w + b, ACTIVATION)
        sums0 += gu
        sums1 += gu * xhat
    target = partials + strip * 2 * C + channel  # [B * strips, 2, C]
    tl.store(target, tl.sum(sums0, 0), mask=known)
    tl.store(target + C, tl.sum(sums1, 0), mask=known)


@triton.jit
def terms_kernel(
    partials,
    weight,
    sums,
    terms,
    P,
    C,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    strips = tl.cdiv(P, PIXELS)
    groups = C // WIDTH
    image = (tl.program_id(0) // groups).to(tl.int64)
    total0, total1 = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for lane in range(0, WIDTH, LANES):
        lanes = lane + tl.arange(0, LANES)
        known = lanes < WIDTH
        channel = tl.program_id(0) % groups * WIDTH + lanes
        sum0, sum1 = tl.zeros([BLOCK, LANES], tl.float32), tl.zeros([BLOCK, LANES], tl.float32)
        for start in range(0, strips, BLOCK):
            strip = start + tl.arange(0, BLOCK)
            inside = (strip < strips)[:, None] & known[None, :]
            source = partials + (image * strips + strip)[:, None] * 2 * C + channel[None, :]
            sum0 += tl.load(source, mask=inside, other=0.0)
            sum1 += tl.load(source + C, mask=inside, other=0.0)
        of_channel0, of_channel1 = tl.sum(sum0, 0), tl.sum(sum1, 0)
        target = sums + image * 2 * C + channel  # [B, 2, C]
        tl.store(target, of_channel0, mask=known)
        tl.store(target + C, of_channel1, mask=known)
        w = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
        total0 += w * of_channel0
        total1 += w * of_channel1
    count = 1.0 * P * WIDTH
    target = terms + tl.program_id(0) * 2  # [B, groups, 2]
    tl.store(target, tl.sum(total0) / count)
    tl.store(target + 1, tl.sum(total1) / count)


@triton.jit
def dx_kernel(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    terms,
    dx,
    P,
    C,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, image, channel, start, left, row, offset = _tile(P, C, ROWS, ROWS, CHANNELS)
    known = channel < C
    inside = (row < left)[:, None] & known[None, :]
    group = image * (C // WIDTH) + channel // WIDTH
    w, scale = _of_channels(weight, channel, known), _of_channels(rstd, group, known)
    xhat = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dy + start + offset, mask=inside, other=0.0).to(tl.float32)
    xhat = (xhat - _of_channels(mean, group, known)) * scale
    gu = _before_activation(upstream, xhat * w + _of_channels(bias, channel, known), ACTIVATION)
    term0, term1 = _of_channels(terms, group * 2, known), _of_channels(terms + 1, group * 2, known)
    tl.store(dx + start + offset, scale * (w * gu - term0 - xhat * term1), mask=inside)
