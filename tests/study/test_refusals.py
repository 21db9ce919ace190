"""What would end the study after hours ends it at once; with the real recipes, which tests of whole runs replace."""

import pytest

from aligntok.cli import main
from aligntok.study import run


def test_unknown_rows_are_refused(capsys, tmp_path):
    assert main(["study", "--output", str(tmp_path), "--only", "[vea]"]) == 2
    assert "no row vea" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "[]"], "expected at least one seed"),
        (["--samples", "1"], "numbers of at least 2"),
        (["--sampling_steps", "[10,0]"], "numbers of at least 2"),
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
