"""Verdicts: what counts as held, as reversed, and as noise; results are made up here, so the answers are known."""

import json

import pytest
from scipy import stats

from aligntok.errors import UserError
from aligntok.options import StudyConfig
from aligntok.study.findings import CLAIMS, CRITICAL, Claim, Comparison, compare, same_latents, verdict
from aligntok.study.measure import Point
from aligntok.study.report import write_report
from aligntok.study.results import ABOVE, GFD, GUIDED, PROBE, RFD, Results, spread
from aligntok.study.rows import NAMES, Row


def _measures(probe, rfd, gfd, fingerprint="a"):
    tokenizer = {
        "reconstruction": {"PSNR [dB]": 17.0, "SSIM": 0.5, "ST-LPIPS": 0.2, "rFD-EffNetLite0": rfd},
        "probe": {"mean": probe, "std": 0.01, "flattened": probe},
        "alignment": {"CKNNA": probe / 2},
        "cost": {"encode [GFLOP]": 1.25, "decode [GFLOP]": 2.5},
        "fingerprint": fingerprint,
        "channels": 32,
    }
    generation = {"gFD-EffNetLite0": gfd, "gKD-EffNetLite0": gfd / 1000, "own gFD-EffNetLite0": gfd / 5}
    generation |= {"recognised": 0.5}
    steps = [(50, 30, 1), (200, 10, 1), (200, 30, 1), (200, 30, 2)]
    return {
        "tokenizers": {"final": tokenizer, "stage2": tokenizer, "stage3": tokenizer},
        "generations": {str(Point(*step)): generation for step in steps},
        "perfect": {"own gFD-EffNetLite0": gfd / 6, "recognised": 0.625},
        "protocols": {"probe": "made up"},
        "machine": {"processor": "abacus", "threads": 1, "torch": "2.0", "date": "2020-02-02"},
    }


def _write(output, rows):
    for (name, seed), measures in rows.items():
        folder = Row(name, seed, output).folder
        folder.mkdir(parents=True)
        (folder / "measures.json").write_text(json.dumps(measures))
        (folder / "times.json").write_text('{"tokenizer": 1800}')
    return Results(output, guidance=2.0)


@pytest.mark.parametrize("n", CRITICAL)
def test_the_threshold_is_students(n):
    assert CRITICAL[n] == pytest.approx(stats.t.ppf(0.95, n - 1), abs=6e-4)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((1.0, 1.1, 0.9), "held"),
        ((-1.0, -1.1, -0.9), "reversed"),
        ((1.0, -1.0, 0.5), "within the noise"),
        ((1.0, 3.0, 0.1), "within the noise"),  # one side in every seed, but t = 1.6
        ((2.0, 2.0), "held"),
        ((0.0, 0.0, 0.0), "within the noise"),
        ((1.0,), "too few seeds"),
        ((), "too few seeds"),
    ],
)
def test_verdict_of_two_rows(differences, expected):
    assert Comparison("vae", "rae", differences, 1).verdict == expected


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1.0, 1.1), (1.0, 1.1)], "held"),
        ([(1.0, 1.1), (1.0, -1.0)], "in part"),
        ([(-1.0, -1.1), (1.0, -1.0)], "did not hold"),
        ([(1.0, 1.1), (1.0,)], "too few seeds"),
    ],
)
def test_verdict_of_an_order(pairs, expected):
    assert verdict([Comparison("vae", "rae", pair, 1) for pair in pairs]) == expected


def test_differences_are_positive_where_the_claim_is_right(tmp_path):
    results = _write(
        tmp_path,
        {
            ("aligntok", 0): _measures(0.6, 200, 180),
            ("aligntok", 1): _measures(0.7, 210, 190),
            ("vae", 0): _measures(0.5, 190, 200),
            ("vae", 2): _measures(0.1, 1, 1),  # a seed that the other has not: left out
        },
    )
    order = ("aligntok", "vae")
    assert compare(results, Claim("", "", PROBE, order))[0].differences == pytest.approx((0.1,))
    assert compare(results, Claim("", "", RFD, order))[0].differences == (-10,)
    assert compare(results, Claim("", "", GFD, order))[0].differences == (20,)


def test_every_claim_about_generation_is_also_asked_of_the_latents():
    asked = {claim.text: claim for claim in CLAIMS if claim.metric is ABOVE}
    assert len(asked) == sum(claim.metric in (GFD, GUIDED) for claim in CLAIMS) == 10
    assert asked["w_sp = 1 is learned better than w_sp = 5"].order == ("aligntok", "w_sp_5")
    assert asked["32 channels are learned better than 64"].paper == "4.05 < 5.24"


def test_claims_name_rows_and_each_only_once():
    for claim in CLAIMS:
        assert set(claim.order) <= set(NAMES) and len(set(claim.order)) == len(claim.order) > 1
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)


def test_equal_latents_are_told_by_their_fingerprints(tmp_path):
    other = _measures(0.5, 1, 1)
    other["tokenizers"]["stage3"] = other["tokenizers"]["stage3"] | {"fingerprint": "b"}
    results = _write(tmp_path, {("three_stages", 0): _measures(0.5, 1, 1), ("three_stages", 1): other})
    assert same_latents(results) == (1, 2)


def test_spread():
    assert spread([], 2) == "" and spread([1.234], 2) == "1.23" and spread([1.0, 3.0], 1) == "2.0 ± 1.4"


def test_an_empty_folder_is_no_study(tmp_path):
    with pytest.raises(UserError, match="holds no measured row of a study; run aligntok study --output"):
        Results(tmp_path, 2.0)


def test_the_report_has_every_number_and_says_what_is_missing(tmp_path):
    rows = {(name, seed): _measures(0.3 + 0.01 * seed, 200 - seed, 150.0) for name in NAMES for seed in (0, 1)}
    del rows["rae", 1]
    _write(tmp_path / "out", rows)
    options = StudyConfig(output=str(tmp_path / "out"), seeds=(0, 1), report=str(tmp_path / "docs" / "text.md"))
    text = write_report(options).read_text()
    assert "measured on abacus, 1 threads, torch 2.0, 2020-02-02; " in text
    assert "means over 2 seeds" in text and "Fewer seeds: RAE (1)." in text
    assert f"training took {(2 * len(NAMES) - 1) / 2:.1f} hours" in text
    assert "| VAE | 32 | 17.00 ± 0.00 | 0.500 ± 0.000 | 0.200 ± 0.000 | 200 ± 1 | 0.305 ± 0.007 |" in text
    assert text.count("| RAE | 32 | 17.00 | 0.500 |") == 1
    assert "equal to those before, to the bit: 2 of 2 seeds" in text
    assert all(claim.text in text for claim in CLAIMS)
    assert "| VAE | 32 | 150 ± 0 | 150 ± 0 | 0.150 ± 0.000 | 30 ± 0 | 25 ± 0 | 5.0 ± 0.0 | 0.500 ± 0.000 | 0.5" in text
    assert "0.500 ± 0.000 | 0.625 ± 0.000 |" in text and "--budget" not in text
    assert "after 200 steps (5.0) by step 50: 4.0 times sooner" in text
    for name in ("trade_off", "convergence", "convergence_above", "sampling"):
        assert f"(text/{name}.png)" in text and (tmp_path / "docs" / "text" / f"{name}.png").stat().st_size > 5_000
    assert "| VAE | 1.25 | 2.50 | 30.0 ± 0.0 |  |" in text
    assert "samples.png" not in text  # no pictures were kept
    kept = json.loads((tmp_path / "docs" / "text" / "results.json").read_text())
    assert kept["vae/seed-1"]["tokenizers"]["final"]["probe"]["mean"] == pytest.approx(0.31)
