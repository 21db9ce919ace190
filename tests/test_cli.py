"""The command line: fast, typed, and one line for every mistake."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from aligntok.cli import COMMANDS, OVERVIEW, main
from aligntok.config.parsing import parse_recipe
from aligntok.config.recipes import recipe_path
from aligntok.errors import UserError


def test_help_needs_neither_torch_nor_half_a_second():
    code = "import sys, aligntok.cli as c; c.main(['--help']); assert not {'torch', 'numpy'} & set(sys.modules)"
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)  # others may be busy, too
    assert done.stdout == OVERVIEW
    assert min(times) < 0.5


PAGE_FAULTS = """
import resource
from aligntok.cli import main
main(["--version"])
import torch
def faults():
    torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
print(faults() - first)
"""


def test_large_cpu_tensors_lie_in_huge_pages_unless_the_user_says_otherwise():
    """64 MiB are 16,384 pages of 4 KiB, or 32 huge ones where the kernel grants them ("never" is its third mode)."""
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    granted = modes.is_file() and "[never]" not in modes.read_text()
    for value, huge in ((None, granted), ("0", granted and "[always]" in modes.read_text())):
        own = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        own |= {} if value is None else {"THP_MEM_ALLOC_ENABLE": value}
        done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], env=own, capture_output=True, text=True, check=True)
        assert (int(done.stdout.split()[-1]) < 5000) == huge


def test_overview_names_every_command():
    assert all(f"\n  {name} " in OVERVIEW for name in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "doctor"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"aligntok {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quikstart"], "did you mean 'quickstart'"),
        (["train-tokenizer", "--data.pth", "x"], "did you mean 'data.path'"),
        (
            ["train-tokenizer", "--tokenizer.stages.stage2.semantic.wieght=0"],
            "did you mean 'tokenizer.stages.stage2.semantic.weight'",
        ),
        (["train-tokenizer", "--config", "imagenet256_f16d23"], "did you mean 'imagenet256_f16d32'"),
        (["train-tokenizer", "--data.image_size", "big"], "data.image_size"),
        (["quickstart", "--data", "/nowhere/at/all", "--output", "{tmp}"], "does not exist"),
        (["sample", "--generator", "/nowhere", "--tokenizer", "/nowhere"], "no generator at"),
        (["sample"], "generator"),
        (["reconstruct", "--tokenizer", "/nowhere"], "no tokenizer at"),
        (
            ["evaluate", "--tokenizer", "/nowhere"],
            "expected one of reconstruction, generation, probe, text-to-image, self-test",
        ),
        (["evaluate", "reconstruction", "--tokenizer", "/nowhere"], "no tokenizer at"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(arguments, message, capsys, tmp_path):
    assert main([a.replace("{tmp}", str(tmp_path)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("command", ["quickstart", "study", "sample", "convert", "evaluate probe"])
def test_commands_for_one_process_refuse_to_be_several(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command.split()) == 2
    assert f"{command} runs in one process, torchrun has started 2" in capsys.readouterr().err


def test_unknown_keys_in_a_file_are_refused_with_the_nearest(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  imag_size: 64\n")
    assert main(["train-tokenizer", "--config", str(file)]) == 2
    assert "did you mean 'data.image_size'" in capsys.readouterr().err


def test_overrides_lie_on_top_of_the_recipe():
    recipe = parse_recipe(
        "train-tokenizer",
        ["--config", "quickstart", "--data.path", "x", "--tokenizer.stages.stage2.semantic.weight=5"],
    )
    assert recipe.data.path == "x" and recipe.data.image_size == 64
    assert recipe.tokenizer.stages.stage2.semantic.weight == 5
    assert recipe.tokenizer.stages.stage2.trains == ("encoder", "adapter", "decoder")


@pytest.mark.parametrize("name", ["quickstart", "imagenet256_f16d32", "imagenet256_f16d64"])
def test_shipped_recipes_parse(name):
    assert recipe_path(name).name == f"{name}.yaml"
    recipe = parse_recipe("train-tokenizer", ["--config", name])
    assert recipe.tokenizer.stages.stage3.trains == ("decoder",)


def test_a_printed_recipe_reads_back_the_same(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["train-tokenizer", "--config", "quickstart", "--data.path", "elsewhere", "--print_config"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    expected = parse_recipe("train-tokenizer", ["--config", "quickstart", "--data.path", "elsewhere"])
    assert parse_recipe("train-tokenizer", ["--config", str(file)]) == expected


def test_missing_recipe_lists_those_that_ship():
    with pytest.raises(UserError, match="imagenet256_f16d32"):
        recipe_path("nothing-like-it")
