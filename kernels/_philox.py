"""Normal noise as a function of a key (seed, offset) and a position: drawn where it is needed, never stored.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns the key `seed` and the counter

    (g P + p, f + b, offset's low word, offset's high word)

of channel group g, pixel p (of P) and image b, the first of which has number f, into four 32-bit words, and Box-Muller
those into the normal numbers of the channels 4g .. 4g + 3 there: words x and y, the first and the second two, give

    r = sqrt(-2 log u),   u = (x // 2) / 2^31 + 2^-32 in (0, 1],   angle = pi / 2 (y mod 2^30) / 2^30
    (+- r cos angle, +- r sin angle), the first negative where bit 31 of y is set, the second where bit 30 is

Every word is used, so that four numbers cost one run of Philox. The noise of an image depends on its number f + b and
neither on the batch size nor on the number of channels: processes that share out a batch draw the noise of the whole.
Words are equal to the bit on every device; the floats differ by the rounding of log, sqrt, sin and cos.

The key is a tensor [2] of int64 on the device and not two Python integers: a kernel reads it there, so that a new key
neither waits for the device nor compiles anything again, and a CUDA graph draws new noise at each replay.
"""

import math

import torch
from torch import Tensor

from ._triton import tl, triton

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # of the key, per round
WORD = 0xFFFFFFFF


def noise_key(device: torch.device | str = "cpu") -> Tensor:
    """A fresh key [2] int64 (seed, offset) from torch's generator of that device: reproducible after manual_seed."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def check_key(key: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the key is [2] int64 on `device`."""
    if key.shape != (2,) or key.dtype != torch.int64 or key.device != device:
        raise ValueError(
            f"key: expected [2] int64 on {device} (see noise_key), got {list(key.shape)} {key.dtype} on {key.device}"
        )


def philox_words(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words per counter, as int64 in [0, 2^32).

    Args:
        counter: four int64 tensors in [0, 2^32) that broadcast.
        seed: int64 [], the 64-bit key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        # The product of two words wraps around in int64, but keeps all of its 64 bits.
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD
        c2, c3 = ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, (k1 + INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def _normal_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller on two words, fp32."""
    radius = torch.sqrt(-2.0 * torch.log((x >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32))
    angle = (y & (2**30 - 1)).to(torch.float32) * (math.pi / 2**31)
    return (
        torch.where(y >= 2**31, -radius, radius) * torch.cos(angle),
        torch.where((y & 2**30) != 0, -radius, radius) * torch.sin(angle),
    )


def flow_noise(key: Tensor, shape: tuple[int, int, int, int] | torch.Size, first_image: int = 0) -> Tensor:
    """The noise z_1 [B, d, h, w] fp32 that `flow_interpolate` and `flow_loss` draw from a key, in plain PyTorch.

    Args:
        key: [2] int64 (seed, offset), see `noise_key`.
        shape: (B, d, h, w).
        first_image: number f of the first image.
    """
    B, d, h, w = shape
    groups, P = -(-d // 4), h * w
    position = torch.arange(groups * P, device=key.device).view(1, groups, P)
    image = torch.arange(first_image, first_image + B, device=key.device).view(B, 1, 1)
    seed, offset = key.unbind()
    words = philox_words((position, image, offset & WORD, (offset >> 32) & WORD), seed)
    lanes = (*_normal_pair(*words[:2]), *_normal_pair(*words[2:]))  # each [B, groups, P]
    return torch.stack(lanes, dim=2).view(B, groups * 4, h, w)[:, :d]


@triton.jit
def noise_words(key, image, pixel, P, BLOCK_C: tl.constexpr):
    """The four words of the counters of one image, [pixels, BLOCK_C / 4] each; `pixel` is [pixels, 1]."""
    seed = tl.load(key)
    offset = tl.load(key + 1)
    position = tl.arange(0, BLOCK_C // 4)[None, :] * P + pixel
    zero = position * 0
    low = zero + (offset & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.philox(seed, position, zero + image.to(tl.int32), low, high)


@triton.jit
def _signed(x, word):
    """x, negative where the word's highest bit is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _kernel_pair(x, y):
    """`_normal_pair`. tl.cos and tl.sin would bring their reduction of huge arguments along, in local memory."""
    uniform = (x >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    radius = tl.sqrt(-1.3862943611198906 * tl.log2(uniform))  # 2 log 2
    # angle = pi / 4 + a with a in [-pi / 4, pi / 4), for which Cephes' polynomials (sinf, cosf) are exact to fp32.
    a = ((y & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 1.4629180792671596e-9  # pi / 2^31
    b = a * a
    sine = a + a * b * (-1.6666654611e-1 + b * (8.3321608736e-3 - b * 1.9515295891e-4))
    cosine = 1 - 0.5 * b + b * b * (4.166664568298827e-2 + b * (-1.388731625493765e-3 + b * 2.443315711809948e-5))
    radius *= 0.7071067811865476  # of cos(pi / 4 + a) = (cos a - sin a) / sqrt 2
    return _signed(radius, y) * (cosine - sine), _signed(radius, y << 1) * (cosine + sine)


@triton.jit
def noise_tile(key, image, pixel, P, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Noise [BLOCK_P, BLOCK_C] fp32 of one image at the pixels [BLOCK_P, 1], the same as `flow_noise`."""
    w0, w1, w2, w3 = noise_words(key, image, pixel, P, BLOCK_C)
    n0, n1 = _kernel_pair(w0, w1)
    n2, n3 = _kernel_pair(w2, w3)
    # [pixels, groups, 2, 2] in the order n0, n1, n2, n3
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BLOCK_P, BLOCK_C)
