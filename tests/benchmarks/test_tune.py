"""The search for configurations, as far as it goes without a GPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import tune


def test_candidates_are_the_pinned_one_and_its_neighbours():
    pinned = {"BLOCK_M": 64, "EVEN": True, "num_warps": 1, "num_stages": 4}
    found = list(tune.candidates(pinned))
    assert found[0] == pinned
    assert len(found) == len({str(c) for c in found}) == 3 * 2 * 2
    assert {c["BLOCK_M"] for c in found} == {32, 64, 128}
    assert {c["num_warps"] for c in found} == {1, 2}
    assert {c["num_stages"] for c in found} == {3, 4}
    assert all(c["EVEN"] is True for c in found)


def test_many_sizes_change_one_at_a_time():
    pinned = {"BLOCK": 64, "DQ_Q": 64, "DQ_K": 16, "DKV_Q": 32, "num_warps": 8, "num_stages": 2}
    found = list(tune.candidates(pinned))
    assert found[0] == pinned and len(found) == len({str(c) for c in found}) == 1 + 2 + 2 + 1 + 2 + 2 + 2
    assert all(sum(c[name] != pinned[name] for name in pinned) == 1 for c in found[1:])


COMPILED = """
from benchmarks import tune
from benchmarks.aot import workloads_of

workload = workloads_of("swiglu")[0]
pinned = tune.pinned_configurations(workload, 80)
assert set(pinned) == {"swiglu_forward", "swiglu_backward"}, pinned
own = pinned["swiglu_backward"]
for block in (own["BLOCK"], 2 * own["BLOCK"], 1000):
    codes = tune.compiled(workload, 80, "swiglu_backward", own | {"BLOCK": block})
    print(codes if isinstance(codes, str) else codes[1].registers)
"""


def test_a_compiled_candidate_has_figures_and_an_impossible_one_a_reason():
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], env=compiling, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pinned, wider, refused = done.stdout.splitlines()
    assert int(wider) > int(pinned), "the candidate was not compiled"
    assert "power of 2" in refused


def test_candidates_are_timed_on_a_gpu_of_their_architecture(monkeypatch, capsys):
    monkeypatch.setattr(tune, "CUDA", True)
    monkeypatch.setattr(tune, "DEVICE", "cuda")
    monkeypatch.setattr(tune, "architecture", lambda device: {"cuda": 80}[device.type])
    monkeypatch.setattr(tune, "pinned_configurations", lambda workload, arch: {})
    timed = []
    monkeypatch.setattr(tune, "timed", lambda workload, usable, seconds: timed.append(workload.op) or {})
    for arch in (80, 90):
        tune.tune(SimpleNamespace(op=f"op for {arch}", label=""), arch, None, 0.1)
    assert timed == ["op for 80"] and "no GPU of sm_90 here" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["-1", "1000"])
def test_an_unknown_workload_is_refused(number, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "swiglu", "--workload", number])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code == 2
    assert "has the workloads 0 to" in capsys.readouterr().err
