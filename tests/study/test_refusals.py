"""What would end the study after hours ends it at once; with the real recipes, which tests of whole runs replace."""

import pytest

from aligntok.cli import main
from aligntok.errors import UserError
from aligntok.study import run
from aligntok.study.rows import known_budget, remember


def test_unknown_rows_are_refused(capsys, tmp_path):
    assert main(["study", "--output", str(tmp_path), "--only", "[vea]"]) == 2
    assert "no row vea" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "[]"], "expected at least one seed"),
        (["--samples", "1"], "1 samples (--samples): covariances"),
        (["--sampling_steps", "[10,0]"], "sampling steps of at least 2"),
        (["--budget", "0"], "a budget of at least 1"),
        (["--only", "[]"], "--only names no row"),
        (["--guidance", "-1"], "sampler.guidance is -1"),
        (["--report", f"{__file__}/study.md"], f"cannot be made, for {__file__} is a file"),
        (["--report", "study"], "its pictures go to the folder study, which would be a file"),
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
    remember(tmp_path, 5, 192)
    remember(tmp_path, 3, 192)  # no row there yet
    (tmp_path / "vae" / "seed-0").mkdir(parents=True)
    remember(tmp_path, 3, 192)
    assert main(["study", "--output", str(tmp_path), "--only", "[vae]"]) == 2
    assert "holds a study of budget 3, samples 192, and budget 1, samples 192 was asked for" in capsys.readouterr().err
    assert known_budget(tmp_path) == 3
    with pytest.raises(UserError, match="budget 3, samples 192, and budget 3, samples 200 was asked for"):
        remember(tmp_path, 3, 200)
