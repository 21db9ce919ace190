"""Verdicts: what counts as held, as reversed, and as noise; results are made up here, so the answers are known."""

import json
from shutil import copytree

import pytest
from scipy import stats

from aligntok.config.options import StudyConfig
from aligntok.errors import UserError
from aligntok.study.findings import (
    CONTROL,
    GENERATION,
    LEARNED,
    TOKENIZERS,
    Claim,
    Comparison,
    compare,
    control,
    paired_p,
    same_latents,
    surviving,
    verdict,
)
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
    generation |= {"recognised": 0.5, "own gKD-EffNetLite0": gfd / 2000}
    steps = [(50, 30, 1), (200, 10, 1), (200, 30, 1), (200, 30, 2)]
    return {
        "tokenizers": {"final": tokenizer, "stage2": tokenizer, "stage3": tokenizer},
        "generations": {str(Point(*step)): generation for step in steps},
        "perfect": {"own gFD-EffNetLite0": gfd / 6, "own gKD-EffNetLite0": gfd / 4000, "recognised": 0.625},
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


def test_p_is_students():
    values = [1.0, 3.0, 0.1, 2.5]
    assert paired_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert paired_p([1.0]) is None and paired_p([2.0, 2.0]) == 0 and paired_p([0.0, 0.0]) == 1


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
        ([(-1.0, -1.1), (1.0, 1.1)], "mixed"),
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


def test_claims_name_rows_and_each_only_once():
    claims = TOKENIZERS + GENERATION
    for claim in claims:
        assert set(claim.order) <= set(NAMES) and len(set(claim.order)) == len(claim.order) > 1
    assert len({claim.text for claim in claims}) == len(claims)
    assert {claim.metric for claim in GENERATION} == {GFD, GUIDED} and all(len(c.order) == 2 for c in GENERATION)


def test_what_decoders_alone_can_do_is_noise(tmp_path):
    """AlignTok and its Stage 3 differ by 10 and 12 above a perfect generator: less than that says nothing."""
    rows = {("aligntok", seed): _measures(0.6, 200, 0.0) for seed in (0, 1)}
    for name, below in (("vae", 11.0), ("va_vae", 13.0), (CONTROL[1], 10.0)):
        for seed in (0, 1):
            rows[name, seed] = _measures(0.6, 200, 0.0)
            more = below + 2 * seed * (name == CONTROL[1])
            for point in rows[name, seed]["generations"].values():
                point["own gFD-EffNetLite0"] = more
    results = _write(tmp_path, rows)
    assert control(results, ABOVE) == 12 and control(results, GFD) == control(results, PROBE) == 0
    for name, expected in (("vae", "within the noise"), ("va_vae", "held")):
        (found,) = compare(results, Claim("", "", GFD, ("aligntok", name)), ABOVE)
        assert found.p == 0 and found.verdict == expected


def test_holms_correction():
    """Three pairs: the smallest p must pass 5 % / 3, the next 5 % / 2; a failure ends it."""
    tight, middling, loose = (Comparison("vae", "rae", (1.0, 1.0 + d, 1.0 - d), 1) for d in (0.05, 0.25, 0.9))
    assert tight.p < 0.05 / 3 and 0.05 / 3 < middling.p < 0.05 / 2 < loose.p
    assert surviving([loose, middling, tight]) == [tight, middling]
    assert surviving([loose, middling, middling]) == [], "the smallest p fails"


def test_equal_latents_are_told_by_their_fingerprints(tmp_path):
    other = _measures(0.5, 1, 1)
    other["tokenizers"]["stage3"] = other["tokenizers"]["stage3"] | {"fingerprint": "b"}
    results = _write(tmp_path, {("three_stages", 0): _measures(0.5, 1, 1), ("three_stages", 1): other})
    assert same_latents(results) == (1, 2)
    interrupted = _measures(0.5, 1, 1)
    del interrupted["tokenizers"]["stage2"]
    assert same_latents(_write(tmp_path / "b", {("three_stages", 0): interrupted})) == (0, 0)


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
    assert "measured on abacus, threads: 1, torch 2.0, 2020-02-02; " in text
    assert "means over 2 seeds" in text and "Fewer seeds: RAE (1)." in text
    assert f"training took {(2 * len(NAMES) - 1) / 2:.1f} hours" in text
    assert "| VAE | 32 | 17.00 ± 0.00 | 0.500 ± 0.000 | 0.200 ± 0.000 | 200 ± 1 | 0.305 ± 0.007 |" in text
    assert text.count("| RAE | 32 | 17.00 | 0.500 |") == 1
    assert "equal to those before, to the bit: 2 of 2 seeds" in text
    assert all(claim.text in text for claim in TOKENIZERS + GENERATION)
    assert "| VAE | 32 | 150 ± 0 | 150 ± 0 | 0.150 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.625 ± 0.000 |" in text
    assert "| VAE | 32 | 30 ± 0 | 25 ± 0 | 5.0 ± 0.0 | 0.037 ± 0.000 |" in text
    assert "made up (VAE, seed 0)" in text and "--budget" not in text
    assert all(metric.name in text for metric in LEARNED)
    assert "| AlignTok, d = 32 / VA-VAE, CNN | **within the noise** 1.0, 1.0 |" in text


def test_a_report_without_the_control_says_so(tmp_path):
    _write(tmp_path / "out", {("aligntok", 0): _measures(0.3, 200, 150.0)})
    options = StudyConfig(output=str(tmp_path / "out"), seeds=(0,), report=str(tmp_path / "text.md"))
    text = write_report(options).read_text()
    assert "were not both trained" in text and f"{len(TOKENIZERS + GENERATION)} more findings are about rows" in text
    assert "No two of the rows that the paper compares were trained." in text


def test_rows_that_the_paper_does_not_compare_have_a_report_too(tmp_path):
    _write(tmp_path / "out", {("stage1_only", 0): _measures(0.3, 200, 150.0)})
    text = write_report(StudyConfig(output=str(tmp_path / "out"), seeds=(0,))).read_text()
    assert "## Cost\n\nNone of the rows that the paper compares was trained." in text


def test_a_number_of_fewer_seeds_says_so(tmp_path):
    """As in the report on a study that is not finished."""
    rows = {("vae", seed): _measures(0.3, 200, 150.0) for seed in (0, 1, 2)}
    rows["vae", 2] |= {"generations": {}}
    _write(tmp_path / "out", rows)
    text = write_report(StudyConfig(output=str(tmp_path / "out"), seeds=(0, 1, 2))).read_text()
    assert "| VAE | 32 | 17.00 ± 0.00 | 0.500 ± 0.000 |" in text
    assert "| VAE | 32 | 150 ± 0 (2) | 150 ± 0 (2) | 0.150 ± 0.000 (2) |" in text


def test_what_somebody_keeps_beside_the_rows_is_not_read(tmp_path):
    results = _write(tmp_path, {("vae", 0): _measures(0.3, 200, 150.0)})
    (tmp_path / "vae" / "seed-0").joinpath("times.json").unlink()
    copytree(tmp_path / "vae" / "seed-0", tmp_path / "vae" / "seed-0.old")
    again = Results(tmp_path, guidance=2.0)
    assert again.seeds("vae") == results.seeds("vae") == [0] and again.minutes("vae", "tokenizer") == []
