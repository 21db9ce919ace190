"""gan_loss: the C++ operator against the reference, and both against formulas written once more here.

test_cuda_build.py runs the CUDA kernel on a CPU; the tests marked cuda at the end need a GPU.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntok._cuda_toolkit import find_toolkit
from aligntok.kernels import _extension_cuda, discriminator_loss, generator_loss, use_implementation
from aligntok.kernels._dtypes import DTYPES
from aligntok.kernels.gan_loss import KINDS

# Largest accepted relative error of results and gradients. bf16 and fp16 gradients are rounded to 8 and 11
# bits, for fp16 twice; losses are fp32 sums of a few thousand terms.
LOSS_ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT_ERROR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def _phi(kind, y):
    return torch.relu(1 + y) if kind == "hinge" else torch.logaddexp(y, torch.zeros_like(y))


def _expected_discriminator(real, fake, kind, lecam_means=None, lecam_weight=0.0):
    loss = 0.5 * (_phi(kind, -real).mean() + _phi(kind, fake).mean())
    if lecam_weight:
        mean_real, mean_fake = lecam_means.tolist()
        squares = (real - mean_fake).clamp(min=0) ** 2, (mean_real - fake).clamp(min=0) ** 2
        loss = loss + lecam_weight * (squares[0].mean() + squares[1].mean())
    stats = [real.mean(), fake.mean(), (real > 0).double().mean(), (fake < 0).double().mean()]
    return loss, torch.stack(stats).detach()


def _expected_generator(fake, kind):
    loss = -fake.mean() if kind == "hinge" else _phi(kind, -fake).mean()
    return loss, torch.stack([fake.mean(), (fake > 0).double().mean()]).detach()


def _logits(shape, dtype, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)


def _assert_close(found, expected, error, terms=0.0):
    """`terms`: the size of what was added up, where a sum may cancel."""
    scale = max(expected.abs().max().item(), terms, torch.finfo(torch.float32).tiny)
    assert (found.double() - expected).abs().max().item() <= error * scale


def _check(function, expected_function, logits, kind, implementation, upstream=1.0, **lecam):
    """Loss, statistics and gradients of one call against the formulas in fp64."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in logits]
    exact = [x.detach().double().requires_grad_() for x in logits]
    dtype = logits[0].dtype
    loss, stats = function(*leaves, kind, implementation=implementation, **lecam)
    expected_loss, expected_stats = expected_function(*exact, kind, **lecam)
    assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert stats.dtype == loss.dtype and not stats.requires_grad
    terms = max(x.detach().abs().mean().item() for x in exact)
    _assert_close(loss, expected_loss, LOSS_ERROR[dtype], terms)
    _assert_close(stats, expected_stats, LOSS_ERROR[dtype], terms)
    (loss * upstream).backward()
    (expected_loss * upstream).backward()
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == dtype and leaf.grad.shape == leaf.shape
        _assert_close(leaf.grad, other.grad, GRADIENT_ERROR[dtype])


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@settings(max_examples=12)
@given(
    real=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    fake=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_the_formula(dtype, kind, implementation, real, fake, seed):
    logits = _logits(real, dtype, seed), _logits(fake, dtype, seed + 1)
    # fp16 needs a loss scale for its gradients to be normal numbers, as in training.
    upstream = 1024.0 if dtype == torch.float16 else 1.0
    _check(discriminator_loss, _expected_discriminator, logits, kind, implementation, upstream)
    _check(generator_loss, _expected_generator, logits[1:], kind, implementation, upstream)


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@settings(max_examples=8)
@given(
    real=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    fake=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    means=st.tuples(st.floats(-3, 3, width=32), st.floats(-3, 3, width=32)),
    weight=st.sampled_from([1e-3, 0.3, 10.0]),
    seed=st.integers(0, 99),
)
def test_lecam_agrees_with_the_formula(dtype, kind, implementation, real, fake, means, weight, seed):
    logits = _logits(real, dtype, seed), _logits(fake, dtype, seed + 1)
    lecam = {"lecam_means": torch.tensor(means), "lecam_weight": weight}
    # Loss scaling as with fp16 training, but below its largest number for the largest weight
    upstream = 128.0 if dtype == torch.float16 else 1.0
    _check(discriminator_loss, _expected_discriminator, logits, kind, implementation, upstream, **lecam)


def test_lecam_pulls_both_sides_together_and_nothing_else():
    # Logits beyond the hinge's margins get no other gradient; those on the other side's far end get none at all.
    real, fake = (torch.tensor([5.0, -5.0]).requires_grad_() for _ in range(2))
    lecam = {"lecam_means": torch.tensor([2.0, -2.0]), "lecam_weight": 0.5}
    loss, _ = discriminator_loss(real, fake, **lecam)
    plain, _ = discriminator_loss(real, fake)
    d_real, d_fake = torch.autograd.grad(loss - plain, (real, fake))
    torch.testing.assert_close(d_real, torch.tensor([0.5 * (5 + 2), 0.0]))
    torch.testing.assert_close(d_fake, torch.tensor([0.0, -0.5 * (2 + 5)]))


def test_lecam_opcheck_and_one_graph():
    real, fake = (_logits((2, 1, 5, 5), torch.float32, seed).requires_grad_() for seed in (0, 1))
    means = torch.tensor([0.3, -0.3])
    operators = torch.ops.aligntok
    torch.library.opcheck(operators.gan_discriminator_loss.default, (real, fake, "hinge", means, 0.3))
    plain = real.detach(), fake.detach(), "hinge", True, True, means, 0.3
    torch.library.opcheck(operators.gan_discriminator_loss_and_gradient.default, plain)

    def step(real, fake):
        return discriminator_loss(real, fake, lecam_means=means, lecam_weight=0.3, implementation="cpp")[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = ([f(real, fake), *torch.autograd.grad(f(real, fake), (real, fake))] for f in (compiled, step))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_lecam_has_no_second_derivative():
    real = _logits(6, torch.float64).requires_grad_()
    lecam = {"lecam_means": torch.zeros(2), "lecam_weight": 0.3}
    loss, _ = discriminator_loss(real, real.detach(), implementation="cpp", **lecam)
    with pytest.raises(NotImplementedError, match="LeCam"):
        torch.autograd.grad(loss, real, create_graph=True)


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_bad_lecam_input_is_named(implementation):
    logits = torch.zeros(3)
    for means, weight, message in (
        (None, 0.1, "got None"),
        (torch.zeros(2), -0.1, "-0.1"),
        (torch.zeros(2), math.nan, "nan"),
        (torch.zeros(3), 0.1, r"\[3\]"),
        (torch.zeros(2).double(), 0.1, "float64"),
        (torch.zeros(2, device="meta"), 0.1, "meta"),
    ):
        with pytest.raises(ValueError, match=message):
            discriminator_loss(logits, logits, lecam_means=means, lecam_weight=weight, implementation=implementation)


# Around the chunk of 4096 logits of the first-stage sum, and enough of them for several threads.
@pytest.mark.parametrize("count", [4095, 4096, 4097, 300_001])
@pytest.mark.parametrize("kind", KINDS)
def test_long_inputs_of_different_length(kind, count):
    logits = _logits(count, torch.float32), _logits(4097, torch.float32, 1)
    _check(discriminator_loss, _expected_discriminator, logits, kind, "cpp")
    _check(generator_loss, _expected_generator, logits[:1], kind, "cpp")


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 3),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=["transposed", "strided", "channels_last", "expanded"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_strides_are_free(kind, view):
    real, fake = (_logits((2, 3, 8, 6), torch.float32, seed).requires_grad_() for seed in (0, 1))
    results = {}
    for implementation in ("cpp", "reference"):
        loss, stats = discriminator_loss(view(real), view(fake), kind, implementation=implementation)
        results[implementation] = [loss.detach(), stats, *torch.autograd.grad(loss, (real, fake))]
    for one, other in zip(results["cpp"], results["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_double(kind):
    # Away from the hinge's corners at 1 and -1, where no finite difference is right.
    real, fake = (_logits((2, 1, 3, 4), torch.float64, seed) for seed in (0, 1))
    real, fake = (x + 0.01 * ((x.abs() - 1).abs() < 0.01) for x in (real, fake))
    with use_implementation("cpp"):
        both = (real.requires_grad_(), fake.requires_grad_())
        assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(r, f, kind)[0], both)
        assert torch.autograd.gradcheck(lambda f: generator_loss(f, kind)[0], (fake,))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    operators = torch.ops.aligntok
    real, fake = (_logits((2, 1, 5, 5), torch.float32, seed).requires_grad_() for seed in (0, 1))
    plain = real.detach(), fake.detach()
    torch.library.opcheck(operators.gan_discriminator_loss.default, (real, fake, kind))
    torch.library.opcheck(operators.gan_generator_loss.default, (fake, kind))
    torch.library.opcheck(operators.gan_discriminator_loss_and_gradient.default, (*plain, kind, True, False))
    torch.library.opcheck(operators.gan_generator_loss_and_gradient.default, (plain[0], kind, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def step(real, fake):
        loss_d, stats_d = discriminator_loss(real * 2, fake, "hinge", implementation="cpp")
        loss_g, stats_g = generator_loss(fake, "non_saturating", implementation="cpp")
        return loss_d + loss_g, stats_d, stats_g

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for height in (5, 7) if dynamic else (5,):
        found, expected = [], []
        for function, results in ((compiled, found), (step, expected)):
            leaves = [_logits((2, 1, height, 6), torch.float32, s).requires_grad_() for s in (0, 1)]
            loss, *stats = function(*leaves)
            results += [loss.detach(), *stats, *torch.autograd.grad(loss, leaves)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_number_of_threads(kind):
    real, fake = (_logits(700_001, torch.float32, seed).requires_grad_() for seed in (0, 1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            loss, stats = discriminator_loss(real, fake, kind, implementation="cpp")
            results.append((loss.detach(), stats, *torch.autograd.grad(loss, (real, fake))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind, implementation):
    extremes = torch.tensor([-1e30, -1e4, -88.0, -20.0, -1.0, -1e-30, 0.0, 1e-30, 1.0, 20.0, 88.0, 1e4, 1e30])
    for value in extremes.tolist():
        logit = torch.tensor([value], requires_grad=True)
        loss, _ = discriminator_loss(logit, logit.detach(), kind, implementation=implementation)
        exact = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        expected, _ = _expected_discriminator(exact, exact.detach(), kind)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        # Below e^-87 the fp32 path returns its smallest normal value rather than a denormal.
        torch.testing.assert_close(logit.grad.double(), exact.grad, rtol=1e-6, atol=2e-38)


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_nan_is_not_swallowed(dtype, kind, implementation):
    logits = torch.zeros(40, dtype=dtype)
    logits[21] = math.nan
    logits.requires_grad_()
    for loss, stats in (
        discriminator_loss(logits, torch.zeros(3, dtype=dtype), kind, implementation=implementation),
        generator_loss(logits, kind, implementation=implementation),
    ):
        assert loss.isnan() and stats[0].isnan()


def test_fp16_gradient_survives_a_loss_scale():
    # 0.5 / 28800 = 1.7e-5 is below fp16's normal range: scaling must come before rounding.
    real, fake = (_logits((32, 1, 30, 30), torch.float16, seed) for seed in (0, 1))
    _check(discriminator_loss, _expected_discriminator, (real, fake), "non_saturating", "cpp", upstream=65536.0)


def test_one_side_without_gradient():
    real, fake = _logits((4, 5), torch.float32), _logits((4, 5), torch.float32, 1).requires_grad_()
    loss, _ = discriminator_loss(real, fake, implementation="cpp")
    loss.backward()
    torch.testing.assert_close(fake.grad, 0.5 / 20 * (fake.detach() > -1).float())
    assert real.grad is None


def test_no_graph_without_need():
    fake = _logits((4, 5), torch.float32).requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss, stats = generator_loss(fake, implementation="cpp")
        assert not loss.requires_grad and not stats.requires_grad
        torch.testing.assert_close(loss, -fake.detach().mean())


def test_second_backward_is_not_disturbed_by_the_first():
    # With an upstream gradient of 1 the saved tensor itself is handed out.
    fake = _logits(50, torch.float32).requires_grad_()
    loss, _ = generator_loss(fake, "non_saturating", implementation="cpp")
    loss.backward(retain_graph=True)
    first = fake.grad.clone()
    fake.grad.mul_(7)
    fake.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(fake.grad, first)
    loss.backward()
    torch.testing.assert_close(fake.grad, 2 * first)


def test_second_derivative_is_right_or_refused():
    fake = torch.randn(6, dtype=torch.float64).requires_grad_()
    loss, _ = generator_loss(fake * fake, "hinge", implementation="cpp")
    (gradient,) = torch.autograd.grad(loss, fake, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), fake)
    torch.testing.assert_close(second, torch.full_like(fake, -2 / 6))
    loss, _ = generator_loss(fake, "non_saturating", implementation="cpp")
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(loss, fake, create_graph=True)
    loss, _ = generator_loss(fake, "non_saturating", implementation="reference")
    (gradient,) = torch.autograd.grad(loss, fake, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), fake)
    torch.testing.assert_close(second, torch.sigmoid(fake) * torch.sigmoid(-fake) / 6)


CHECK_CAPABILITY = """
import torch
from aligntok.kernels._dtypes import DTYPES
from aligntok.kernels.gan_loss import KINDS, discriminator_loss, discriminator_loss_reference
found = torch.backends.cpu.get_cpu_capability().replace("NO AVX", "DEFAULT")  # as torch 2.8 calls it
assert found == "{capability}", found
torch.manual_seed(0)
for dtype in DTYPES:
    for kind in KINDS:
        real, fake = (torch.randn(n).mul(3).to(dtype).requires_grad_() for n in (5003, 97))
        results = []
        for loss, stats in (
            discriminator_loss(real, fake, kind, implementation="cpp"),
            discriminator_loss_reference(real, fake, kind),
        ):
            results.append([loss.detach(), stats, *torch.autograd.grad(loss * 1024, (real, fake))])
        for one, other in zip(*results):
            error = {{torch.bfloat16: 2**-7, torch.float16: 2**-9}}.get(dtype, 1e-6)
            one, other = one.double(), other.double()
            assert (one - other).abs().max() <= error * other.abs().max(), (dtype, kind)
"""


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_older_instruction_sets(capability):
    """The loops for lesser processors, run on this one. The tests above run the best it has."""
    available = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2" and available not in ("AVX2", "AVX512"):
        capability = "DEFAULT"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
    script = CHECK_CAPABILITY.format(capability=capability)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_bad_input_is_named(implementation):
    logits = torch.zeros(3)
    cases = [
        (
            lambda: discriminator_loss(logits, logits, "wgan", implementation=implementation),
            "hinge, non_saturating",
        ),
        (lambda: generator_loss(logits, "wgan", implementation=implementation), "'wgan'"),
        (lambda: generator_loss(logits.long(), implementation=implementation), "torch.int64"),
        (lambda: generator_loss(logits[:0], implementation=implementation), r"\(0,\)"),
        (lambda: discriminator_loss(logits, logits[:0], implementation=implementation), "fake logits"),
        (lambda: discriminator_loss(logits, logits.double(), implementation=implementation), "float64"),
        (lambda: discriminator_loss(logits, logits.to("meta"), implementation=implementation), "meta"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_operator_itself_checks_too():
    operator = torch.ops.aligntok.gan_discriminator_loss.default
    with pytest.raises(ValueError, match="no logits"):
        operator(torch.zeros(0), torch.zeros(1), "hinge")
    with pytest.raises(ValueError, match="dtype"):
        operator(torch.zeros(1), torch.zeros(1).double(), "hinge")
    with pytest.raises(ValueError, match="wgan"):
        operator(torch.zeros(1), torch.zeros(1), "wgan")


def test_reference_agrees_with_torchs_own_losses():
    real, fake = _logits((4, 1, 9, 9), torch.float32), _logits((4, 1, 9, 9), torch.float32, 1)
    loss, _ = discriminator_loss(real, fake, "non_saturating")
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(loss, 0.5 * (bce(real, ones) + bce(fake, zeros)))
    # relu(1 - x) is the ranking loss of x against 0 with margin 1; so is relu(1 + x) with the sides
    # exchanged.
    ranking = F.margin_ranking_loss
    expected = 0.5 * (ranking(real, zeros, ones, margin=1.0) + ranking(zeros, fake, ones, margin=1.0))
    torch.testing.assert_close(discriminator_loss(real, fake, "hinge")[0], expected)


@pytest.fixture
def cuda_part():
    """The extension's CUDA part runs on this machine's device; missing is forgiven only where nvcc is missing too."""
    if _extension_cuda.refusal(torch.device("cuda")) and find_toolkit()[0] is None:
        pytest.skip("needs nvcc")


@pytest.fixture
def cuda_logits(cuda_part):
    """A function that makes logits on the GPU; with an offset they do not begin on a 16-byte boundary."""

    def make(count, dtype, seed, offset=0):
        return _logits(count + offset, dtype, seed).cuda()[offset:]

    return make


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_on_cuda(dtype, kind, cuda_logits):
    lecam = {"lecam_means": torch.tensor([0.4, -0.6], device="cuda"), "lecam_weight": 0.3}
    upstream = 1024.0 if dtype == torch.float16 else 1.0
    for real, fake, offset in ((1, 3, 0), (28_800, 28_800, 0), (5003, 97, 1), (700_001, 1025, 3)):
        logits = cuda_logits(real, dtype, 0, offset), cuda_logits(fake, dtype, 1)
        _check(discriminator_loss, _expected_discriminator, logits, kind, "cpp", upstream)
        _check(discriminator_loss, _expected_discriminator, logits, kind, "cpp", upstream, **lecam)
        _check(generator_loss, _expected_generator, logits[:1], kind, "cpp", upstream)


def _cuda_results(real, fake):
    loss, stats = discriminator_loss(real, fake, "non_saturating", implementation="cpp")
    return [loss.detach(), stats, *torch.autograd.grad(loss, (real, fake))]


@pytest.mark.cuda
def test_on_cuda_bits_and_streams(cuda_logits):
    real, fake = (cuda_logits(300_001, torch.float32, seed).requires_grad_() for seed in (0, 1))
    first = _cuda_results(real, fake)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for turn in range(40):  # launches of several streams overlap, each stream with its own counter
        with torch.cuda.stream(streams[turn % 4]):
            found.append(_cuda_results(real, fake))
    torch.cuda.synchronize()
    for other in found:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.cuda
def test_on_cuda_in_a_graph_without_synchronisation(cuda_logits):
    real, fake = (cuda_logits(28_800, torch.float32, seed).requires_grad_() for seed in (0, 1))
    expected = _cuda_results(real, fake)
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        _cuda_results(real, fake)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):  # a synchronisation would end the capture with an error
        found = _cuda_results(real, fake)
    for _ in range(3):
        for tensor in found:
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
