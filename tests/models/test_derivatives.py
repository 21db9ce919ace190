"""Both networks and the losses of networks through forward mode, vmap and second derivatives, as MeanFlow needs them.

What is right is told by central differences of the same network in fp64, by loops, and by the reference kernels.
"""

import copy
from functools import partial

import pytest
import torch
from helpers import tiny_tokenizer
from kernel_checks import relative_error
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from aligntok.config import EncoderConfig, LightningDiTConfig, SamplerConfig
from aligntok.diffusion import sampler
from aligntok.diffusion.condition import Condition
from aligntok.kernels import explain, use_implementation
from aligntok.losses import st_lpips
from aligntok.losses.perceptual import PerceptualDistance
from aligntok.losses.semantic import semantic_loss
from aligntok.models.attention import SHORT_SEQUENCE, attend, refusal
from aligntok.models.dit_dh import DiTDH
from aligntok.models.encoder import Encoder
from aligntok.models.lightning_dit import LightningDiT

STEP = 1e-5
TOLERANCE = 1e-4  # of a network in fp32 against fp64
LABELS = torch.tensor([0, 2])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_tokenizer()
    made.set_statistics(drawn(8, seed=1), drawn(8, seed=2).abs() + 0.5)
    return made.requires_grad_(False)


def generator(kind=LightningDiT):
    """With weights everywhere: fresh ones give zero velocity."""
    torch.manual_seed(0)
    head = {"head_depth": 1, "head_width": 48, "head_heads": 2} if kind is DiTDH else {"qk_norm": True}
    model = kind(LightningDiTConfig(size="custom", depth=2, width=32, heads=2, classes=3, **head), 4, (4, 4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def encode_wide(tokenizer, images):
    """`encode` in the dtype of a widened tokenizer; the method gives float32."""
    raw = tokenizer.raw_latents(images)
    return (raw - tokenizer.latent_mean.view(-1, 1, 1)) / tokenizer.latent_std.view(-1, 1, 1)


def decode_wide(tokenizer, latents):
    return tokenizer.decoder(latents * tokenizer.latent_std.view(-1, 1, 1) + tokenizer.latent_mean.view(-1, 1, 1))


def central(function, points, directions, step=STEP):
    """Derivative of `function` at `points` along `directions`, in fp64."""
    at = [[x.double() + sign * step * v.double() for x, v in zip(points, directions, strict=True)] for sign in (1, -1)]
    above, below = (function(*x).double() for x in at)
    return (above - below) / (2 * step)


def by_dual_numbers(function, points, directions):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, points, directions))).tangent


def check_forward(function, wide, points, directions, step=STEP, tolerance=TOLERANCE):
    """jvp and dual numbers against central differences of `wide` and against the reference kernels."""
    expected = central(wide, points, directions, step)
    assert expected.abs().max() > 1e-3
    found = jvp(function, points, directions)[1]
    assert relative_error(found, expected) < tolerance
    assert relative_error(by_dual_numbers(function, points, directions), expected) < tolerance
    with use_implementation("reference"):
        assert torch.equal(jvp(function, points, directions)[1], found)


def check_hessian_product(function, wide, point, direction, compiled=True):
    """Forward over reverse with auto, and reverse over reverse with the reference; auto refuses the latter where an
    operator is compiled."""

    def slope(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(wide(x).square().mean(), x)[0]

    def loss(x):
        return function(x).square().mean()

    expected = central(slope, (point,), (direction,))
    assert relative_error(jvp(grad(loss), (point,), (direction,))[1], expected) < 10 * TOLERANCE
    if compiled:
        with pytest.raises(NotImplementedError, match='implementation="reference"'):
            torch.autograd.functional.hvp(loss, point, direction)
    with use_implementation("reference"):
        found = torch.autograd.functional.hvp(loss, point, direction)[1]
    assert relative_error(found, expected) < 10 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_a_tokenizer_has_a_forward_derivative(tokenizer, part):
    wide = partial({"encode": encode_wide, "decode": decode_wide}[part], copy.deepcopy(tokenizer).double())
    shape = {"encode": (2, 3, 32, 48), "decode": (2, 8, 2, 3)}[part]
    check_forward(getattr(tokenizer, part), wide, (drawn(*shape, seed=3),), (drawn(*shape, seed=4),))


@torch.no_grad()
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_a_tokenizer_under_vmap(tokenizer, part):
    function = getattr(tokenizer, part)
    batch = drawn(3, *{"encode": (1, 3, 32, 48), "decode": (1, 8, 2, 3)}[part], seed=3)
    assert relative_error(vmap(function)(batch), torch.stack([function(x) for x in batch])) < 1e-5


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_a_tokenizer_has_second_derivatives(tokenizer, part):
    wide = partial({"encode": encode_wide, "decode": decode_wide}[part], copy.deepcopy(tokenizer).double())
    function, shape = getattr(tokenizer, part), {"encode": (1, 3, 32, 32), "decode": (1, 8, 2, 2)}[part]
    compiled = part == "decode" and explain("group_norm_silu", "cpu").name == "cpp"
    check_hessian_product(function, wide, drawn(*shape, seed=3), drawn(*shape, seed=4), compiled)


@torch.no_grad()
def test_an_encoder_that_resizes_has_a_forward_derivative():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(name="test_vit.r160_in1k", weights="random", layer=1, downsample=32))
    point, direction = drawn(1, 3, 64, 64, seed=3), drawn(1, 3, 64, 64, seed=4)
    expected = central(copy.deepcopy(encoder).double(), (point,), (direction,), 1e-2)  # it resizes in float32
    assert relative_error(jvp(encoder, (point,), (direction,))[1], expected) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", [LightningDiT, DiTDH])
def test_meanflow_derivative_of_a_generator(kind):
    """d u(z_t, t) / dt along the flow: tangents v in z and 1 in t."""
    model = generator(kind).eval()
    wide = copy.deepcopy(model).double()
    points, directions = (
        (drawn(2, 4, 4, 4, seed=3), torch.tensor([0.3, 0.8])),
        (drawn(2, 4, 4, 4, seed=4), torch.ones(2)),
    )
    # Features of the time are float32 in the network, which a small step would not survive
    options = {"step": 3e-3, "tolerance": 2e-3}
    check_forward(lambda z, t: model(z, t, LABELS), lambda z, t: wide(z, t, LABELS), points, directions, **options)


def test_meanflow_training_step():
    """The velocity that comes out of jvp is a part of the graph: its weights get the gradient of an ordinary call."""
    model, z, t, v = generator(), drawn(2, 4, 4, 4, seed=3), torch.tensor([0.3, 0.8]), drawn(2, 4, 4, 4, seed=4)
    u, along = jvp(lambda z, t: model(z, t, LABELS), (z, t), (v, torch.ones(2)))
    target = (v - t.view(-1, 1, 1, 1) * along).detach()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((u - target).square().mean(), parameters)
    expected = torch.autograd.grad((model(z, t, LABELS) - target).square().mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_gradients_of_each_sample_and_hessian_products_of_a_generator():
    model, z, t = generator().eval(), drawn(2, 4, 4, 4, seed=3), torch.tensor([0.3, 0.8])
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(weights, z, t, label):
        return functional_call(model, weights, (z[None], t[None], label[None])).square().mean()

    found = vmap(grad(loss), (None, 0, 0, 0))(weights, z, t, LABELS)
    for i in range(2):
        total = model(z[i : i + 1], t[i : i + 1], LABELS[i : i + 1]).square().mean()
        names = list(weights)
        expected = torch.autograd.grad(total, [model.get_parameter(name) for name in names])
        for name, one in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][i], one, atol=1e-6, rtol=1e-4, msg=name)
    wide = copy.deepcopy(model).double()
    one = z[:1], drawn(1, 4, 4, 4, seed=4)
    check_hessian_product(lambda z: model(z, t[:1], LABELS[:1]), lambda z: wide(z, t[:1], LABELS[:1]), *one)


@torch.no_grad()
def test_long_attention_inside_transforms():
    """PyTorch's fused attention has neither a forward derivative nor a second one."""
    q, k, v = (drawn(2, SHORT_SEQUENCE + 1, 8, seed=i) for i in range(3))
    tangents = tuple(drawn(*q.shape, seed=10 + i) for i in range(3))
    found = jvp(attend, (q, k, v), tangents)[1]
    assert relative_error(found, central(attend, (q, k, v), tangents)) < TOLERANCE
    assert relative_error(vmap(attend)(*(x.unsqueeze(1) for x in (q, k, v))), attend(q, k, v).unsqueeze(1)) < 1e-5


def test_second_derivatives_of_long_attention_by_pytorchs_plain_one():
    q, v = drawn(1, 1, SHORT_SEQUENCE + 1, 8), drawn(1, 1, SHORT_SEQUENCE + 1, 8, seed=1)

    def total(q):
        return attend(q, q, q).square().sum()

    with pytest.raises(RuntimeError, match=r"derivative .* is not implemented"):
        torch.autograd.functional.hvp(total, q, v)
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.functional.hvp(total, q, v)[1]
    assert relative_error(found, jvp(grad(total), (q,), (v,))[1]) < TOLERANCE


def test_other_libraries_are_refused_inside_transforms():
    with forward_ad.dual_level():
        for backend in ("flash-attn", "xformers"):
            assert "forward-mode" in refusal(backend, "cuda", torch.bfloat16, 64)
        assert 'implementation="reference"' in refusal("fused", "cuda", torch.bfloat16, 64)


@torch.no_grad()
def test_samples_have_a_forward_derivative_by_the_noise():
    model = generator().eval()
    config = SamplerConfig(solver="heun", steps=4, guidance=2.0)
    points, directions = (drawn(2, 4, 4, 4, seed=3),), (drawn(2, 4, 4, 4, seed=4),)

    def sample(noise):
        return sampler.integrate(model, noise, Condition.of_labels(LABELS, 3), config)

    expected = central(lambda z: sample(z.float()), points, directions, 1e-2)  # its state is float32
    assert relative_error(jvp(sample, points, directions)[1], expected) < 1e-3
    assert relative_error(by_dual_numbers(sample, points, directions), expected) < 1e-3


@pytest.fixture(scope="module")
def perceptual():
    """The network of ST-LPIPS with random weights."""
    torch.manual_seed(0)
    layers, taps = st_lpips.alex_layers()
    widths = [next(x.out_channels for x in layers[tap::-1] if isinstance(x, torch.nn.Conv2d)) for tap in taps]
    return PerceptualDistance("st-lpips-alex", layers, taps, [torch.rand(width) for width in widths], 21)


@torch.no_grad()
def test_a_perceptual_distance_has_a_forward_derivative_and_a_vmap(perceptual):
    points, directions = (tuple(drawn(2, 3, 32, 32, seed=seed + i) for i in range(2)) for seed in (3, 13))
    # A longer step crosses the kinks of ReLUs and maxima
    check_forward(perceptual, copy.deepcopy(perceptual).double(), points, directions, step=1e-7, tolerance=1e-3)
    batch = [x.unsqueeze(1) for x in points]
    assert relative_error(vmap(perceptual)(*batch), perceptual(*points).unsqueeze(1)) < 1e-5


def test_a_perceptual_distance_has_second_derivatives(perceptual):
    wide, other = copy.deepcopy(perceptual).double(), drawn(1, 3, 32, 32, seed=5)
    point, direction = drawn(1, 3, 32, 32, seed=3), drawn(1, 3, 32, 32, seed=4)
    check_hessian_product(lambda x: perceptual(x, other), lambda x: wide(x, other.double()), point, direction)


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_the_semantic_loss_has_second_derivatives_forward_over_reverse(kind):
    point, direction, target = (drawn(2, 4, 3, 3, seed=i) for i in range(3))
    loss = partial(semantic_loss, target=target, kind=kind)
    found = jvp(grad(loss), (point,), (direction,))[1]
    assert relative_error(found, torch.autograd.functional.hvp(loss, point, direction)[1]) < TOLERANCE


def _weight_gradients(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = model(drawn(2, 4, 4, 4, seed=3), torch.tensor([0.3, 0.8]), LABELS).square().mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("kind", [LightningDiT, DiTDH])
def test_what_a_generator_keeps_from_other_modes_serves_training(kind, implementation):
    """Rotary tables are made once: under inference mode, without gradients or inside a transform."""
    z, t = drawn(2, 4, 4, 4, seed=5), torch.tensor([0.1, 0.9])
    expected = _weight_gradients(generator(kind))
    uses = {
        "inference": torch.inference_mode()(lambda model: model(z, t, LABELS)),
        "no gradients": torch.no_grad()(lambda model: model(z, t, LABELS)),
        "jvp": lambda model: jvp(lambda z: model(z, t, LABELS), (z,), (z,)),
        "vmap": lambda model: vmap(lambda z: model(z[None], t[:1], LABELS[:1]))(z),
        "dual numbers": lambda model: by_dual_numbers(lambda z: model(z, t, LABELS), (z,), (z,)),
    }
    for name, use in uses.items():
        model = generator(kind)
        use(model)
        with use_implementation(implementation):
            found = _weight_gradients(copy.deepcopy(model))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3, msg=name)


def test_a_tokenizer_trains_after_inference_mode():
    images, gradients = drawn(1, 3, 32, 32, seed=3), []
    for use in (False, True):
        made = tiny_tokenizer()
        made.set_statistics(torch.zeros(8), torch.ones(8))
        if use:
            with torch.inference_mode():
                made.decode(made.encode(images))
        total = made.decode(made.encode(images)).square().mean()
        gradients.append(torch.autograd.grad(total, list(made.parameters()), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
