"""Whether the CUDA part of `aligntok._C` can run on a device.

The library holds machine code for the architectures of its build and, where one of them is written "9.0+PTX", code
that the driver translates for later ones. Machine code of architecture x.y runs on x.z with z >= y.
"""

import torch

from . import _extension


def _runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability):
            return True
    return False


def refusal(device: torch.device) -> str | None:
    """Why the CUDA part cannot run on `device`, or None.

    Without a CUDA device (a faked one, as in a compiler's trace) only the build is looked at.
    """
    if device.type != "cuda":
        return f"the CUDA part of aligntok._C is not for tensors on {device.type!r}"
    reason = _extension.unavailable()
    if reason:
        return reason
    report = _extension.build_report()
    assert report is not None  # or the extension would be unavailable
    cuda = report["cuda"]
    if not cuda["built"]:
        return f"aligntok._C has no CUDA part: {cuda['reason']}"
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if _runs_on(capability, cuda["architectures"]):
        return None
    return (
        f"aligntok._C is compiled for CUDA architectures {', '.join(cuda['architectures'])}, the device has "
        f"{'.'.join(map(str, capability))}: set TORCH_CUDA_ARCH_LIST and run `pip install -e .` again"
    )
