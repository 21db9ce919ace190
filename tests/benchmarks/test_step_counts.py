"""What a step asks of the host, counted for small recipes."""

from pathlib import Path

import pytest

from benchmarks import step_counts

RECIPE = """
tokenizer:
  model:
    adapter:
      latent_channels: 8
generator:
  condition: {condition}
  model:
    size: custom
    depth: {depth}
    width: 64
    heads: 2
  text:
    encoder:
      name: minilm-l6
      width: 32
      tokens: 8
    model:
      width: 64
      heads: 2
      double_blocks: {depth}
      single_blocks: 1
      pad_to: 1
"""


def _counted(folder: Path, condition: str, depth: int) -> dict[str, dict]:
    file = folder / f"{condition}{depth}.yaml"
    file.write_text(RECIPE.format(condition=condition, depth=depth))
    return {row["step"]: row for row in step_counts.rows_of(str(file))}


@pytest.mark.parametrize("condition", ["class", "text"])
def test_training_waits_once_and_sampling_never(condition, tmp_path):
    one, two = (_counted(tmp_path, condition, depth) for depth in (1, 2))
    assert (one["training"]["waits"], one["sampling, guided"]["waits"]) == (1, 0)
    for step, row in one.items():
        launches, deeper = row["launches"], two[step]["launches"]
        assert all(0 < launches[name] < deeper[name] for name in step_counts.SHOWN), (step, launches, deeper)
        assert launches["fused eager"] < launches["eager reference"] and step in "".join(step_counts.table([row]))
    # the update aside, a block's launches in training are those of its forward and its backward pass
    sampled, trained = (one[step]["launches"]["fused eager"] for step in ("sampling, guided", "training"))
    assert trained > 2 * sampled


def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE.format(condition="class", depth=1))
    monkeypatch.setattr("sys.argv", ["step_counts", "--recipes", str(file)])
    assert step_counts.main() == 0
    head, _, training, sampling = capsys.readouterr().out.splitlines()
    assert head.endswith("| waits |") and "| training |" in training and sampling.endswith("| 0 |")
