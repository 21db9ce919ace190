"""The Triton kernels of `adapter_projection`: z and the distance in one pass over p; dp, dW and db in another.

Forward, a program owns BLOCK_M rows of p and walks over their columns. Backward, it owns BLOCK_C columns and walks over
a share of the rows, with its part of dW in registers; the next rows are loaded while these are worked on.
"""

from ._triton import tl, triton


@triton.jit
def _upper_tail(t):
    """1 - Phi(t) for t >= 0, as 2^P(t). P is the minimax polynomial of degree 5 for log2(1 - Phi), weighted so that
    gelu and its slope are off by less than 1e-6 anywhere (the tests compare them in fp64); it falls for all t >= 0, so
    that the tail needs no clamp. erff costs more than twice the instructions, which would bound these kernels."""
    P = -0.0005007347790524364
    P = P * t + 0.007285174913704395
    P = P * t - 0.05234865844249725
    P = P * t - 0.45941007137298584
    P = P * t - 1.1510530710220337
    return tl.exp2(P * t - 1.0000017881393433)


@triton.jit
def _gelu(x):
    t = tl.abs(x)
    return tl.maximum(x, 0.0) - t * _upper_tail(t)  # NaN stays NaN: it comes through the tail


@triton.jit
def _gelu_and_slope(x):
    t = tl.abs(x)
    tail = _upper_tail(t)
    density = tl.exp2(t * t * -0.7213475204444817 - 1.3257480647361593)  # exp(-t^2 / 2) / sqrt(2 pi), in powers of 2
    slope = tail - t * density  # at -t; the slope at t is 1 minus it
    return tl.maximum(x, 0.0) - t * tail, tl.where(x > 0, 1 - slope, slope)


@triton.jit
def _offset(row, N, image_stride, token_stride, IMAGES: tl.constexpr):
    """Where rows begin: `row` counts tokens through all images, N an image; without IMAGES one stride is enough."""
    if IMAGES:
        return (row // N).to(tl.int64) * image_stride + (row % N).to(tl.int64) * token_stride
    return row.to(tl.int64) * token_stride


@triton.jit
def _forward_kernel(
    p, weight, bias, z0, z, partials, M, N, C, d,
    p_image, p_token, z0_image, z0_token, z0_channel,
    GELU: tl.constexpr, SNAPSHOT: tl.constexpr, P_IMAGES: tl.constexpr, Z0_IMAGES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    in_rows, in_channels = row < M, channel < d
    p_row = p + _offset(row, N, p_image, p_token, P_IMAGES)[:, None]  # [BLOCK_M, 1]
    weight_row = weight + channel[None, :] * C  # [1, BLOCK_D]
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    column = tl.arange(0, BLOCK_C)
    p_tile = tl.load(p_row + column[None, :], mask=in_rows[:, None] & (column < C)[None, :], other=0.0)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        w_inside = (column < C)[:, None] & in_channels[None, :]
        w = tl.load(weight_row + column[:, None], mask=w_inside, other=0.0)
        following = column + BLOCK_C
        next_p = tl.load(p_row + following[None, :], mask=in_rows[:, None] & (following < C)[None, :], other=0.0)
        dtype = z.dtype.element_ty
        if GELU:
            hidden = _gelu(p_tile.to(tl.float32))
        else:
            hidden = p_tile
        accumulator = tl.dot(hidden.to(dtype), w.to(dtype), accumulator, input_precision=PRECISION)
        p_tile = next_p
    accumulator += tl.load(bias + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    rounded = accumulator.to(z.dtype.element_ty)
    inside = in_rows[:, None] & in_channels[None, :]
    tl.store(z + row.to(tl.int64)[:, None] * d + channel[None, :], rounded, mask=inside)
    if SNAPSHOT:
        z0_row = z0 + _offset(row, N, z0_image, z0_token, Z0_IMAGES)[:, None]
        target = tl.load(z0_row + channel[None, :] * z0_channel, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, rounded.to(tl.float32) - target, 0.0)
        tl.store(partials + tl.program_id(0), tl.sum(difference * difference))


@triton.jit
def _load_cotangent(
    dz, z, z0, row, end, channel, d, N,
    dz_image, dz_token, dz_channel, z0_image, z0_token, z0_channel,
    SNAPSHOT: tl.constexpr, DZ_IMAGES: tl.constexpr, Z0_IMAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [rows, channels] of what e is made of: dz, z, z_0."""
    inside = (row < end)[:, None] & (channel < d)[None, :]
    dz_row = dz + _offset(row, N, dz_image, dz_token, DZ_IMAGES)[:, None]
    dz_tile = tl.load(dz_row + channel[None, :] * dz_channel, mask=inside, other=0.0)
    if not SNAPSHOT:
        return dz_tile, dz_tile, dz_tile
    z_tile = tl.load(z + row.to(tl.int64)[:, None] * d + channel[None, :], mask=inside, other=0.0)
    z0_row = z0 + _offset(row, N, z0_image, z0_token, Z0_IMAGES)[:, None]
    return dz_tile, z_tile, tl.load(z0_row + channel[None, :] * z0_channel, mask=inside, other=0.0)


@triton.jit
def _cotangent(dz, z, z0, factor, SNAPSHOT: tl.constexpr):
    """e = dz + factor * (z - z_0), fp32."""
    if SNAPSHOT:
        return dz.to(tl.float32) + factor * (z.to(tl.float32) - z0.to(tl.float32))
    return dz.to(tl.float32)


@triton.jit
def _backward_kernel(
    p, weight, dz, z, z0, ddistance, dp, dweight, dbias, M, N, C, d, rows,
    p_image, p_token, dz_image, dz_token, dz_channel, z0_image, z0_token, z0_channel,
    GELU: tl.constexpr, SNAPSHOT: tl.constexpr, INPUT_GRADIENT: tl.constexpr,
    P_IMAGES: tl.constexpr, DZ_IMAGES: tl.constexpr, Z0_IMAGES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of columns through one split of the rows. The loads of the next rows are issued before the work on
    these: they are what the pipeline has in flight."""
    split = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = tl.arange(0, BLOCK_D)
    in_columns, in_channels = column < C, channel < d
    dtype = dz.dtype.element_ty
    if INPUT_GRADIENT:
        w_inside = in_channels[:, None] & in_columns[None, :]
        w = tl.load(weight + channel[:, None] * C + column[None, :], mask=w_inside, other=0.0).to(dtype)
    factor = 0.0
    if SNAPSHOT:
        factor = 2 * tl.load(ddistance)
    first, end = split * rows, tl.minimum((split + 1) * rows, M)
    row = first + tl.arange(0, BLOCK_M)
    p_row = p + _offset(row, N, p_image, p_token, P_IMAGES)[:, None]
    p_tile = tl.load(p_row + column[None, :], mask=(row < end)[:, None] & in_columns[None, :], other=0.0)
    dz_tile, z_tile, z0_tile = _load_cotangent(
        dz, z, z0, row, end, channel, d, N, dz_image, dz_token, dz_channel, z0_image, z0_token, z0_channel,
        SNAPSHOT, DZ_IMAGES, Z0_IMAGES,
    )  # fmt: skip
    bias_sum = _cotangent(dz_tile, z_tile, z0_tile, factor, SNAPSHOT)  # [BLOCK_M, BLOCK_D]
    e = bias_sum.to(dtype)
    weight_sum = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_M):
        row = start + BLOCK_M + tl.arange(0, BLOCK_M)
        p_row = p + _offset(row, N, p_image, p_token, P_IMAGES)[:, None]
        next_p = tl.load(p_row + column[None, :], mask=(row < end)[:, None] & in_columns[None, :], other=0.0)
        dz_tile, z_tile, z0_tile = _load_cotangent(
            dz, z, z0, row, end, channel, d, N, dz_image, dz_token, dz_channel, z0_image, z0_token, z0_channel,
            SNAPSHOT, DZ_IMAGES, Z0_IMAGES,
        )  # fmt: skip
        if GELU:
            hidden, slope = _gelu_and_slope(p_tile.to(tl.float32))
        else:
            hidden = p_tile
        # As [BLOCK_C, BLOCK_D]: 64 rows or more are what sm_90's wgmma takes, and no warp of sm_80 repeats another's.
        product = tl.dot(tl.trans(hidden.to(dtype)), e, tl.trans(weight_sum), input_precision=PRECISION)
        weight_sum = tl.trans(product)
        if INPUT_GRADIENT:
            gradient = tl.dot(e, w, input_precision=PRECISION)
            if GELU:
                gradient *= slope
            row -= BLOCK_M
            inside = (row < end)[:, None] & in_columns[None, :]
            tl.store(dp + row.to(tl.int64)[:, None] * C + column[None, :], gradient, mask=inside)
        cotangent = _cotangent(dz_tile, z_tile, z0_tile, factor, SNAPSHOT)
        bias_sum += cotangent
        e = cotangent.to(dtype)
        p_tile = next_p
    target = dweight + (split * d + channel).to(tl.int64)[:, None] * C + column[None, :]
    tl.store(target, weight_sum, mask=in_channels[:, None] & in_columns[None, :])
    if tl.program_id(0) == 0:
        tl.store(dbias + split * d + channel, tl.sum(bias_sum, axis=0), mask=in_channels)
