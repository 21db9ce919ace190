"""What would end the study after hours ends it at once; with the real recipes, which tests of whole runs replace."""

import pytest

from aligntok.cli import main
from aligntok.study import run
from aligntok.study.rows import known_budget, remember_budget


def test_unknown_rows_are_refused(capsys, tmp_path):
    assert main(["study", "--output", str(tmp_path), "--only", "[vea]"]) == 2
    assert "no row vea" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "[]"], "expected at least one seed"),
        (["--samples", "1"], "at least 2 samples and steps"),
        (["--sampling_steps", "[10,0]"], "at least 2 samples and steps"),
        (["--budget", "0"], "a budget of at least 1"),
    ],
)
def test_what_would_fail_after_hours_fails_at_once(options, message, capsys, tmp_path):
    assert main(["study", "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_lora_row_asks_for_peft_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert main(["study", "--output", str(tmp_path / "out")]) == 2
    assert "pip install 'aligntok[peft]'" in capsys.readouterr().err
    assert main(["study", "--output", str(tmp_path / "out"), "--only", "[vea]"]) == 2


def test_rows_of_two_budgets_are_not_mixed(capsys, tmp_path):
    remember_budget(tmp_path, 5)
    remember_budget(tmp_path, 3)  # no row there yet
    (tmp_path / "vae" / "seed-0").mkdir(parents=True)
    remember_budget(tmp_path, 3)
    assert main(["study", "--output", str(tmp_path), "--only", "[vae]"]) == 2
    assert "holds a study of budget 3, and 1 was asked for" in capsys.readouterr().err
    assert known_budget(tmp_path) == 3
