"""norm_ratio: the C++ operator and the reference against norms written once more here, in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntok._cuda_toolkit import find_toolkit
from aligntok.kernels import _extension_cuda, use_implementation
from aligntok.kernels._dtypes import DTYPES
from aligntok.kernels.norm_ratio import MAX_TENSORS_CUDA, norm_ratio

# Largest accepted relative error. The C++ implementation sums in fp64; its result is rounded to fp32 once.
ERROR = {"cpp": 2e-7, "reference": 2e-6}
IMPLEMENTATIONS = ("cpp", "reference")
SHAPES = st.lists(st.lists(st.integers(0, 7), min_size=0, max_size=3), min_size=1, max_size=4)


def _tensors(shapes, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).mul(scale).to(dtype) for s in shapes]


def _expected(a, b, delta, limit):
    above, below = (math.sqrt(sum(t.double().square().sum().item() for t in tensors)) for tensors in (a, b))
    return min(above / (below + delta), limit)


def _check(a, b, implementation, delta=1e-4, limit=1e4):
    found = norm_ratio(a, b, delta=delta, limit=limit, implementation=implementation)
    double = a[0].dtype == torch.float64
    assert found.shape == () and found.dtype == (torch.float64 if double else torch.float32)
    assert not found.requires_grad and found.device == a[0].device
    assert found.item() == pytest.approx(_expected(a, b, delta, limit), rel=1e-13 if double else ERROR[implementation])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@settings(max_examples=15)
@given(a=SHAPES, b=SHAPES, seed=st.integers(0, 99))
def test_any_list_of_shapes(dtype, implementation, a, b, seed):
    _check(_tensors(a, dtype, seed), _tensors(b, dtype, seed + 1), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_are_free(implementation):
    x, y = _tensors([(3, 8, 5, 5), (3, 8, 5, 5)])
    views = [x.to(memory_format=torch.channels_last), x.transpose(0, 3), x[:, ::2, 1:], x[:1].expand(4, -1, -1, -1)]
    for view in views:
        _check([view], [y, view], implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_limit_zero_and_nan(implementation):
    one, zero = [torch.ones(5)], [torch.zeros(5)]
    _check(one, zero, implementation, limit=7.0)
    _check(zero, one, implementation)
    assert norm_ratio(one, zero, implementation=implementation).item() == math.inf
    bad = [torch.ones(5), torch.tensor([1.0, math.nan])]
    assert norm_ratio(bad, one, limit=2.0, implementation=implementation).isnan()
    assert norm_ratio(one, bad, limit=2.0, implementation=implementation).isnan()


def test_squares_neither_overflow_nor_vanish():
    huge, tiny = _tensors([(50,)], scale=1e30), _tensors([(50,)], seed=1, scale=1e-30)
    _check(huge, huge, "cpp")
    _check(tiny, tiny, "cpp", delta=0.0)


def test_bits_do_not_depend_on_the_number_of_threads():
    a, b = _tensors([(700_001,), (5,)]), _tensors([(300_000,)], seed=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(norm_ratio(a, b, delta=1e-4, implementation="cpp").item())
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1
    _check(a, b, "cpp")


def test_no_graph_and_opcheck():
    a = [t.requires_grad_() for t in _tensors([(3, 4), (5,)])]
    assert not norm_ratio(a, a, implementation="cpp").requires_grad
    plain = [t.detach() for t in a]
    torch.library.opcheck(torch.ops.aligntok.norm_ratio.default, (plain, plain[:1], 1e-4, 10.0))


def test_compiles_as_one_graph():
    def step(x, y):
        return norm_ratio([x * 2], [y, x], delta=1e-4, limit=1e4, implementation="cpp") * x

    x, y = _tensors([(3, 4), (5,)])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), step(x, y))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_input_is_named(implementation):
    one = [torch.ones(2)]
    with use_implementation(implementation):
        for a, b, message in (
            ([], one, "0 and 1"),
            (one, [], "1 and 0"),
            ([torch.ones(2).long()], one, "torch.int64"),
            (one, [torch.ones(2).double()], "float64"),
            (one, [torch.ones(2, device="meta")], "meta"),
        ):
            with pytest.raises(ValueError, match=message):
                norm_ratio(a, b)


@pytest.fixture
def cuda_part():
    """The extension's CUDA part runs on this machine's device; missing is forgiven only where nvcc is missing too."""
    if _extension_cuda.refusal(torch.device("cuda")) and find_toolkit()[0] is None:
        pytest.skip("needs nvcc")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_on_cuda(dtype, cuda_part):
    shapes = [(3, 128, 3, 3), (), (0,), (17, 5), (300_001,)]
    a, b = ([t.cuda() for t in _tensors(shapes, dtype, seed)] for seed in (0, 1))
    for numerators, denominators in ((a, b), (a[:1], b[:1]), ([a[4][1:]], b)):  # the last begins off 16 bytes
        _check(numerators, denominators, "cpp")
        results = {norm_ratio(numerators, denominators, implementation="cpp").item() for _ in range(3)}
        assert len(results) == 1
    empty = [t.cuda() for t in _tensors([(0,)], dtype)]
    assert norm_ratio(empty, empty, delta=1.0, implementation="cpp").item() == 0


@pytest.mark.cuda
def test_on_cuda_too_many_tensors_take_the_reference(cuda_part):
    many = [torch.ones(1, device="cuda")] * (MAX_TENSORS_CUDA + 1)
    _check(many, many[:1], "reference")
    assert norm_ratio(many, many[:1]).item() == pytest.approx(math.sqrt(len(many)))
    with pytest.raises(ValueError, match="more than 128"):
        norm_ratio(many, many[:1], implementation="cpp")
