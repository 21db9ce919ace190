"""A test of the tests: copies of kernels with one deliberate mistake each must fail the check that originals pass."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_checks import check_kernel, normal
from torch import Tensor

import aligntok.kernels
from aligntok.kernels import _dispatch
from aligntok.kernels.joint_attention import joint_attention_reference
from aligntok.kernels.qknorm_attention import qknorm_attention_reference
from aligntok.kernels.swiglu import swiglu_reference
from aligntok.models.lightning_dit import rope_table

FOLDER = Path(aligntok.kernels.__path__[0])


def _load(file: str, text: str, folder: Path) -> ModuleType:
    """Import changed source as a module of the package, under a name of its own."""
    copy = folder / file
    copy.write_text(text)
    name = f"aligntok.kernels.{copy.stem}"
    spec = importlib.util.spec_from_file_location(name, copy)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _copy(files: tuple[str, ...], tag: str, old: str, new: str, folder: Path) -> Callable:
    """The public function of a copy of an operator, with `old` replaced in those of its files that have it.

    `files` import one another in this order, the operator's own last. The copy's operators are registered under other
    names, and the dispatch keeps the original's entry.
    """
    sources = {file: (FOLDER / f"{file}.py").read_text() for file in files}
    assert any(old in text for text in sources.values()), f"{files} have no {old!r}: say what to break instead"
    registered = dict(_dispatch._registry)
    try:
        for number, (file, text) in enumerate(sources.items()):
            changed = text.replace(old, new).replace('@operator("', f'@operator("{tag}_')
            for imported in files[:number]:
                changed = changed.replace(f"from .{imported} import", f"from .{imported}_{tag} import")
            module = _load(f"{file}_{tag}.py", changed, folder)
        return getattr(module, files[-1])
    finally:
        _dispatch._registry.clear()
        _dispatch._registry.update(registered)


def _check_swiglu(operator: Callable) -> None:
    packed = normal(3, 2 * 37, seed=1).requires_grad_()
    check_kernel(lambda x: operator(x, implementation="triton"), swiglu_reference, [packed])


def _check_attention(operator: Callable) -> None:
    qkv = normal(1, 10, 3, 1, 32, seed=2).requires_grad_()
    weights = [(1 + 0.3 * normal(32, seed=3 + i)).requires_grad_() for i in range(2)]
    tables = [table.to(qkv.device) for table in rope_table((2, 5), 32, 5)]
    inputs = [qkv, *weights, *tables]
    check_kernel(lambda *x: operator(*x, implementation="triton"), qknorm_attention_reference, inputs, 1e-4)


def _check_joint(operator: Callable, streams: int = 2) -> None:
    tokens = (40, 9) if streams == 2 else (49,)
    packed = [normal(2, n, 3, 1, 32, seed=5 + i).requires_grad_() for i, n in enumerate(tokens)]
    weights = [(1 + 0.3 * normal(32, seed=7 + i)).requires_grad_() for i in range(2 * streams)]
    cos, sin = (table[:, ::2].to(packed[0].device) for table in rope_table((7, 7), 32, 7))
    lengths = torch.tensor([35, 3], device=packed[0].device)

    def called(function: Callable, **options: str) -> Callable:
        def call(*x: Tensor) -> tuple[Tensor, ...]:
            rest = (cos.to(x[-1].dtype), sin.to(x[-1].dtype))
            parts = x[:streams], x[streams : 2 * streams], x[2 * streams :]
            return function(*parts, *rest, text_tokens=40, lengths=lengths, **options)

        return call

    reference = called(joint_attention_reference)
    check_kernel(called(operator, implementation="triton"), reference, [*packed, *weights], 1e-4)


def _check_joint_in_one(operator: Callable) -> None:
    _check_joint(operator, 1)


ATTENTION = (
    "_qknorm_attention_tiles",
    "_qknorm_attention_blocks",
    "_qknorm_attention_kernels",
    "qknorm_attention",
)
JOINT = ("_qknorm_attention_tiles", "_qknorm_attention_blocks", "_joint_attention_kernels", "joint_attention")
CASES = {
    "off-by-one mask": (
        ("swiglu",), "inside = column < H", "inside = column < H - 1", _check_swiglu,
    ),
    "no softmax scale in the gradient of the keys": (
        ATTENTION, "prologue, scale / factor,", "prologue, 1.0 / factor,", _check_attention,
    ),
    "rotation in the wrong direction in the backward pass": (
        ATTENTION, "ROPE, -1)", "ROPE, 1)", _check_attention,
    ),
    "two tables in each other's place": (
        ATTENTION, "eps, cos, sin, factor =", "eps, sin, cos, factor =", _check_attention,
    ),
    "the image turned as if it stood first": (
        JOINT, "cos + before * (D // 2)", "cos", _check_joint,
    ),
    "masked keys are looked at": (
        JOINT, "tl.minimum(tl.load(lengths + batch).to(tl.int32), L)", "L", _check_joint,
    ),
    "masked keys get the gradients of those that are looked at": (
        JOINT, "dk, dv = _kept(dk, first, end), _kept(dv, first, end)", "pass", _check_joint,
    ),
    "the scales of the text for the image": (
        JOINT, "(N, image, image_k)", "(N, image, text_k)", _check_joint,
    ),
    "both streams in one array, each result as if it were alone there": (
        JOINT, "(L + N, L + N) if TOGETHER else (L, N)", "(L, N)", _check_joint_in_one,
    ),
    "partial sums of one stream counted for the other": (
        JOINT, "partial.split(blocks)", "partial.split(blocks[::-1])", _check_joint,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CASES)
def test_a_broken_copy_is_caught_and_a_faithful_one_is_not(mistake, tmp_path):
    files, old, new, check = CASES[mistake]
    number = list(CASES).index(mistake)
    check(_copy(files, f"faithful{number}", old, old, tmp_path))
    # By number, or, where ttsem executes the compiled kernels, as two programs that write to one place
    with pytest.raises(Exception, match=r"relative error|both touch element"):
        check(_copy(files, f"broken{number}", old, new, tmp_path))
