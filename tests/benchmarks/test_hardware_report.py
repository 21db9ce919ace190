"""The hardware report: traffic is counted by address, every rule can be broken, code comes from the compiler."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from kernel_checks import DEVICE

from aligntok.kernels import swiglu
from aligntok.kernels._triton import INTERPRETED, record_launches, tl, triton
from benchmarks import bench_swiglu, hardware_report
from benchmarks.aot import _widths, launches_of, occupancy, workloads_of
from benchmarks.gpu_check import parts


@triton.jit
def _sum_twice_kernel(x, y, N: tl.constexpr):
    column = tl.arange(0, N)
    mask = column < 5
    total = tl.load(x + column, mask=mask, other=0.0) + tl.load(x + column, mask=mask, other=0.0)
    tl.store(y + column, total, mask=mask)


def test_traffic_is_counted_by_address():
    from benchmarks.traffic import recorded_traffic

    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    x, y = torch.ones(8), torch.zeros(8)
    with recorded_traffic() as launches:
        _sum_twice_kernel[(3,)](x, y, N=8)
    [found] = launches
    assert found.total == 3 * 15 * 4  # three programs, two loads and a store of five numbers
    assert found.unique == 10 * 4
    assert y.tolist() == [2.0] * 5 + [0.0] * 3


def test_eager_operators_are_charged_inputs_and_outputs():
    from benchmarks.traffic import EagerTraffic

    x = torch.empty(6, 10, device="meta")
    with EagerTraffic() as traffic:
        x.t()[:5] * x.new_empty(1, 6).expand(5, 6)
    assert traffic.bytes == 4 * (30 + 6 + 30)  # views and allocations are free


def test_launches_are_recorded_without_computing():
    [workload] = [w for w in bench_swiglu.WORKLOADS if w.shape["H"] == 3072]
    forward, backward = launches_of(workload, 90)
    assert [launch.kernel.__name__ for launch in forward + backward] == ["_forward_kernel", "_backward_kernel"]
    assert forward[0].grid == (65536, 3) and forward[0].arguments["H"] == 3072
    with record_launches(80) as launches:
        swiglu(torch.ones(2, 6, device=DEVICE), implementation="triton")
    assert launches == []  # real tensors are computed on


def test_occupancy_follows_the_scarcest_resource():
    assert occupancy(80, registers=32, shared=0, warps=4) == 1.0
    assert occupancy(80, registers=128, shared=0, warps=4) == 0.25
    assert occupancy(90, registers=32, shared=100 * 1024, warps=8) == 2 * 8 / 64
    assert occupancy(80, registers=16, shared=0, warps=1) == 0.5  # 32 blocks


def test_load_widths_are_read_from_sass():
    sass = "LDG.E.128 R4;\n@P0 LDG.E.64.CONSTANT R4;\nLDGSTS.E.BYPASS.LTC128B.128 [R1];\nLDG.E.U16 R2;\nLDG.E R3;\n"
    assert _widths(sass, r"\b(?:LDGSTS|LDG)((?:\.\w+)*)") == {"128": 2, "64": 1, "32": 1, "16": 1}


CODE = {
    "op": "o", "kernel": "k", "workload": "w", "arch": 80, "spilled_bytes": 0, "dots": 1, "hmma": 4, "hgmma": 0,
    "utcmma": 0, "shared": 1024, "atomics": 0,
}  # fmt: skip
TRAFFIC = {"op": "o", "label": "w", "of_plan": [1.0, 1.09], "ratio": [1.0, 1.5], "reason": "it has to"}
CUDA = {"kernel": "k", "source": "s", "arch": 80, "spilled_bytes": 0}


@pytest.mark.parametrize(
    ("code", "traffic", "cuda", "message"),
    [
        ({"spilled_bytes": 8}, {}, {}, "8 bytes of registers are spilled"),
        ({"hmma": 0}, {}, {}, "without tensor cores"),
        ({"shared": 164 * 1024}, {}, {}, "bytes of shared memory"),
        ({"atomics": 1}, {}, {}, "1 atomics"),
        ({}, {"of_plan": [1.0, 1.2]}, {}, "backward: 1.20 of the planned traffic"),
        ({}, {"reason": ""}, {}, "backward: 1.50 of the minimum, without a reason"),
        ({}, {}, {"spilled_bytes": 4}, "4 bytes spilled"),
    ],
)
def test_every_rule_can_be_broken(code, traffic, cuda, message):
    assert hardware_report.problems([CODE], [TRAFFIC], [CUDA]) == []
    [found] = hardware_report.problems([CODE | code], [TRAFFIC | traffic], [CUDA | cuda])
    assert message in found


def test_kernels_are_compiled_without_a_device():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "swiglu", "--arch", "80"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    first = answer.stdout.splitlines()[0]
    assert "kernel=_forward_kernel arch=80" in first and "spilled_bytes=0" in first
    assert re.search(r"loads=\{'128': \d+\}", first)


def test_every_operator_has_workloads_and_is_in_the_gpu_check():
    wanted = set(hardware_report.triton_operators())
    assert len(wanted) >= 10
    for op in wanted:
        assert all(workload.op == op for workload in workloads_of(op))
    assert {f"bench_{op}" for op in wanted} <= {part.name for part in parts()}


PHASES = """
import re, triton
from triton.backends.compiler import GPUTarget
from benchmarks.aot import launches_of, source, workloads_of

workload = next(w for w in workloads_of("qknorm_attention") if w.shape["N"] == 64 and w.shape["D"] == 64)
_, [launch] = launches_of(workload, 80)
code = triton.compile(source(launch), target=GPUTarget("cuda", 80, 32), options=launch.options).asm
memory = re.sub(r"ttg.barrier all", "| barrier |", code["ttgir"])
print(launch.kernel.__name__, *("tt.store" in part for part in memory.split("| barrier |")), sep=",")
print(len(re.findall(r"ld\\.global[.\\w]*\\.nc", code["ptx"])))
"""


def test_what_phases_hand_on_through_memory_is_behind_a_barrier():
    """The interpreter runs a program in order, whatever barriers there are: only the compiled code can tell."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PHASES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["_short_backward_kernel,True,True,True", "0"]


def test_a_workload_that_plans_more_than_the_minimum_says_why():
    for op in hardware_report.triton_operators():
        for workload in workloads_of(op):
            pairs = zip(workload.minimum(2, **workload.shape), workload.plan(2, **workload.shape), strict=True)
            shares = [planned / least for least, planned in pairs if least]
            assert min(shares) >= 1, "a minimum is what every implementation moves"
            assert bool(workload.reason) == (max(shares) > hardware_report.TRAFFIC_LIMIT), workload


def test_eager_attention_is_charged_as_a_flash_kernel():
    """Bytes grow as the tokens do, and not as the scores, which are never written out."""
    from benchmarks.traffic import eager_costs

    (workload, *_) = workloads_of("qknorm_attention")
    longer = replace(workload, shape=workload.shape | {"N": 8 * workload.shape["N"]})
    few, many = (sum(eager_costs(one)["bytes"]) for one in (workload, longer))
    assert many == pytest.approx(8 * few, rel=0.02)
