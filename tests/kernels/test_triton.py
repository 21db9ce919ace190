"""The launch that all Triton kernels share: on the GPU of its tensors."""

from contextlib import contextmanager

import pytest
import torch

from aligntok.kernels import _triton


class OnGpu(torch.Tensor):
    """A tensor without values that says that it lies on a GPU."""

    @staticmethod
    def __new__(cls, device: str):
        return torch.Tensor._make_wrapper_subclass(cls, (2,), device=device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("nothing is computed here")


@pytest.fixture
def current(monkeypatch) -> list[int]:
    """Two GPUs, of which the first is current; the last entry is the current one."""
    numbers = [0]

    @contextmanager
    def device(chosen):
        numbers.append(chosen.index)
        yield
        numbers.append(0)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: numbers[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return numbers


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", 1), ("cuda:0", 0)])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_kernel_runs_on_the_gpu_of_its_tensors(device, expected, by_name, current):
    """Triton launches on the current one, with the pointers of another."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **meta: launched.append((grid, current[-1]))

    tensor = OnGpu(device)
    if by_name:
        _triton.launch(Kernel(), (3,), x=tensor, N=2)
    else:
        _triton.launch(Kernel(), (3,), tensor, N=2)
    assert launched == [((3,), expected)] and current[-1] == 0


def test_tensors_of_the_processor_need_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("there is no GPU"))
    with _triton._current([torch.zeros(2)]), _triton._current([]):
        pass
