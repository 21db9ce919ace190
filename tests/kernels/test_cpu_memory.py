"""The allocator that keeps the memory of freed CPU tensors: what it gives back, how much it holds, threads, forks.

It is the allocator of the whole process, so every case runs in a process of its own, forked from one that has imported
everything.
"""

import json
import subprocess
import sys

import pytest

START = """
import json, os, sys, threading, traceback
import torch
from aligntok.devices import choose_precision
from aligntok.kernels import _extension
assert _extension.unavailable() is None
op = torch.ops.aligntok
torch.set_num_threads(1)
MIB = 2**20

def address(tensor):
    return tensor.data_ptr()

def kept():
    return op.cpu_memory()[1]

def floats(mib):
    return torch.empty(mib * MIB // 4)

def tried(code):
    # What went wrong, in a process of its own
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            exec(code, dict(globals()))
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said or (f"status {status}" if status else "")

print(json.dumps({name: tried(code) for name, code in json.load(sys.stdin).items()}))
"""
ON = "op.keep_cpu_memory(True)"
CHOOSES = """
os.environ["ALIGNTOK_KEEP_MEMORY"] = "{value}"
choose_precision("{device}")
tensor = torch.ones(100)
assert (op.cpu_memory()[0] > 0) is {taken}
"""

CASES = {
    "a freed tensor leaves its memory to the next of its size": """
for count in (1, 3, 1000, 70_001, 3 * MIB, 33 * MIB):
    tensor = torch.empty(count, dtype=torch.uint8)
    place = address(tensor)
    assert place % 64 == 0
    tensor.fill_(255)
    del tensor
    again = torch.zeros(count, dtype=torch.uint8)
    assert address(again) == place and not again.any()
""",
    "an eighth of a power of two is the most that is wasted": """
sizes = [2**n + d for n in range(8, 26) for d in (-1, 0, 1, 2 ** (n - 1))]
for size in sizes:
    used = op.cpu_memory()[0]
    tensor = torch.empty(size, dtype=torch.uint8)
    taken = op.cpu_memory()[0] - used
    del tensor
    assert size + 64 <= taken <= size * 9 / 8 + 64 + 64 + (4096 if taken >= MIB else 0), (size, taken)
""",
    "tensors do not overlap": """
torch.manual_seed(0)
held = []
for step in range(3000):
    size = int(torch.randint(1, 2 ** int(torch.randint(1, 21, ())), ()))
    held.append((torch.full((size,), step % 251, dtype=torch.uint8), step % 251))
    if len(held) > 50:
        tensor, value = held.pop(int(torch.randint(len(held), ())))
        assert (tensor == value).all()
assert all((tensor == value).all() for tensor, value in held)
""",
    "sizes of the past are given back": """
big = [floats(64) for _ in range(16)]
del big
assert kept() >= 1024 * MIB
for size in range(70, 170, 4):  # sizes that are asked for once
    floats(size)
    assert kept() <= 1024 * MIB * 5 // 4 + 256 * MIB
with open("/proc/self/statm") as file:
    assert int(file.read().split()[1]) * 4096 < 1024 * MIB  # only touched memory counts, and these were not
""",
    "off again": """
kept_tensor = torch.ones(MIB)
op.keep_cpu_memory(False)
used = op.cpu_memory()[0]
plain = torch.ones(MIB)
assert op.cpu_memory()[0] == used
before = kept()
del kept_tensor
assert kept() > before
del plain
""",
    "nothing, resized, cloned, shared with NumPy": """
empty = torch.empty(0)
assert address(empty) == 0
tensor = torch.arange(10).resize_(100_000)
assert tensor[:10].tolist() == list(range(10))
array = tensor.numpy()
twin = tensor.clone()
del tensor
floats(1)
assert (array[:10] == range(10)).all() and twin[9] == 9
""",
    "threads": """
def work(number):
    generator = torch.Generator().manual_seed(number)
    for step in range(400):
        size = int(torch.randint(1, 300_000, (), generator=generator))
        tensor = torch.full((size,), number)
        wrong.extend([number] * int((tensor != number).any()))

wrong = []
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not wrong
""",
    "a fork while another thread allocates": """
stop = []
def work():
    while not stop:
        torch.empty(1000)
thread = threading.Thread(target=work)
thread.start()
children = []
for _ in range(40):
    child = os.fork()
    if not child:
        torch.empty(5000)
        os._exit(0)
    children.append(child)
statuses = [os.waitpid(child, 0)[1] for child in children]
stop.append(True)
thread.join()
assert statuses == [0] * 40
""",
    "too much": """
for size in (2**60, 2**62):
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        assert "no memory on the CPU" in str(error) and "smaller batch" in str(error)
    else:
        raise AssertionError(size)
assert torch.ones(5).sum() == 5
""",
    "the profiler sees it": """
with torch.profiler.profile(profile_memory=True) as profile:
    floats(8)
assert max(event.self_cpu_memory_usage for event in profile.key_averages()) == 8 * MIB
""",
}


CHOICES = {
    "wanted": CHOOSES.format(value=1, device="cpu", taken=True),
    "not wanted": CHOOSES.format(value=0, device="cpu", taken=False),
    "on another device": CHOOSES.format(value=1, device="meta", taken=False),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    cases = {name: f"{ON}\n{code}" for name, code in CASES.items()} | CHOICES
    done = subprocess.run(
        [sys.executable, "-c", START], input=json.dumps(cases), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="on Linux only")
@pytest.mark.parametrize("name", CASES)
def test_memory(outcomes, name):
    assert not outcomes[name]


@pytest.mark.skipif(sys.platform != "linux", reason="on Linux only")
@pytest.mark.parametrize("name", CHOICES)
def test_a_job_on_the_cpu_turns_it_on_if_it_is_wanted(outcomes, name):
    assert not outcomes[name]
