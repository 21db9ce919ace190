"""The noise of a key: published words, the same words and numbers in kernel and PyTorch, normal, independent."""

import pytest
import torch
from kernel_checks import DEVICE
from scipy import stats

from aligntok.kernels._philox import WORD, check_key, flow_noise, noise_key, noise_words, philox_words
from aligntok.kernels._triton import tl, triton
from aligntok.kernels.flow_interpolate import flow_interpolate


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    seed = key[0] + (key[1] << 32)
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    found = philox_words(tuple(torch.tensor([c]) for c in counter), seed)
    assert tuple(word.item() for word in found) == words


@triton.jit
def _words_kernel(key, out, image, P, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    pixel = tl.arange(0, BLOCK_P)[:, None]
    words = noise_words(key, image, pixel, P, BLOCK_C)
    place = pixel * (BLOCK_C // 4) + tl.arange(0, BLOCK_C // 4)[None, :]
    for i in tl.static_range(4):
        tl.store(out + i * BLOCK_P * (BLOCK_C // 4) + place, words[i].to(tl.int64))


@pytest.mark.parametrize("key", [(0, 0), (2**63 - 2, 2**63 - 3), (2**40 + 17, 2**35 + 5)])
def test_kernel_and_reference_have_equal_words(key):
    P, image = 8, 3
    key = torch.tensor(key, device=DEVICE)
    out = torch.empty(4, P, 4, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](key, out, image, P, BLOCK_P=P, BLOCK_C=16)
    position = torch.arange(4 * P, device=DEVICE).view(4, P)
    offset = key[1] & WORD, key[1] >> 32
    expected = philox_words((position, torch.full_like(position, image), *offset), key[0])
    assert torch.equal(out & WORD, torch.stack(expected).transpose(1, 2))


def test_kernel_and_reference_have_equal_numbers():
    key = noise_key(DEVICE)
    zero = torch.zeros(2, 6, 9, 11, device=DEVICE)
    found = flow_interpolate(zero, torch.ones(2, device=DEVICE), key, implementation="triton")
    torch.testing.assert_close(found, flow_noise(key, zero.shape), rtol=0, atol=5e-6 if DEVICE == "cpu" else 1e-3)


def test_normal_and_independent():
    noise = flow_noise(torch.tensor([12345, 678]), (64, 32, 16, 16)).double()
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    assert noise.abs().max() > 4.5  # of 524,288 normal numbers, one in 147,000 is larger
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    for axis in range(4):  # neighbours along images, channels, rows and columns
        a, b = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
        assert abs((a * b).mean()) < 4 / a.numel() ** 0.5
        # Box-Muller's pairs share their radius: uncorrelated is not enough.
        assert abs(((a.square() - 1) * (b.square() - 1)).mean() / 2) < 4 / a.numel() ** 0.5


def test_an_image_has_its_noise_whatever_the_batch_and_the_channels():
    key = torch.tensor([5, 6])
    noise = flow_noise(key, (4, 7, 3, 5))
    assert torch.equal(flow_noise(key, (2, 7, 3, 5)), noise[:2])
    assert torch.equal(flow_noise(key, (4, 2, 3, 5)), noise[:, :2])
    for other in ([6, 6], [5, 7], [5 + 2**32, 6], [5, 6 + 2**32]):
        assert not torch.equal(flow_noise(torch.tensor(other), (4, 7, 3, 5)), noise)


def test_keys():
    torch.manual_seed(3)
    first, second = noise_key(), noise_key()
    torch.manual_seed(3)
    assert torch.equal(noise_key(), first) and not torch.equal(first, second)
    for wrong in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), first.to("meta")):
        with pytest.raises(ValueError, match="noise_key"):
            check_key(wrong, torch.device("cpu"))
