"""The verdicts of a study as Markdown tables: of tokenizers, of generators by several numbers each, and of speed."""

from __future__ import annotations

import math

from aligntok.study.findings import (
    CONTROL,
    GENERATION,
    LEARNED,
    LEARNED_OF_TEXT,
    LEVEL,
    NOISE,
    TEXT,
    TOKENIZERS,
    Comparison,
    compare,
    control,
    surviving,
    verdict,
)
from aligntok.study.results import ABOVE, ABOVE_KD, GFD, Metric, Results
from aligntok.study.rows import NAMES
from aligntok.study.speed import factors

SPEED = (("aligntok", "va_vae"), ("aligntok", "vae"), ("va_vae", "vae"))  # the paper: about 5x for the first
SPEED_OF_TEXT = (("aligntok", "flux"), ("aligntok", "va_vae"), ("aligntok", "vae"))


def markdown(lines: list[list[str]]) -> str:
    """A table: its head, a line of dashes, its rows."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def findings(results: Results) -> str:
    """Two tables of verdicts: of tokenizers, and of generators by several numbers each."""
    claimed, learned = ((), TEXT) if results.text else (TOKENIZERS, GENERATION), _learned(results)
    asked = [[c for c in claims if all(map(results.seeds, c.order))] for claims in claimed]
    tokenizers = {claim: compare(results, claim) for claim in asked[0]}
    generation = {claim: [compare(results, claim, m) for m in (claim.metric, *learned)] for claim in asked[1]}
    tested = [pair for pairs in tokenizers.values() for pair in pairs]
    tested += [pair for columns in generation.values() for pairs in columns for pair in pairs]
    firm = {id(pair) for pair in surviving(tested)}

    first = [["the paper", "its numbers", "metric here", "verdict", "pairs"], ["---"] * 5]
    for claim, pairs in tokenizers.items():
        listed = "; ".join(f"{pair}{_star(pair, firm)}" for pair in pairs)
        first.append([claim.text, claim.paper, claim.metric.name, f"**{verdict(pairs)}**", listed])
    heads = ["gFD to real pictures", *(metric.name for metric in learned)]
    second = [["the paper: generates better", "its gFID", *heads], ["---"] * (2 + len(heads))]
    for claim, columns in generation.items():
        cells = [f"**{pair.verdict}**{_star(pair, firm)} {pair.numbers}" for (pair,) in columns]
        second.append([claim.text, claim.paper, *cells])
    parts = [_rule(results, tested, firm, sum(map(len, claimed)) - sum(map(len, asked)))]
    return "\n\n".join(parts + [markdown(lines) for lines in (first, second) if len(lines) > 2])


def _learned(results: Results) -> tuple[Metric, ...]:
    return LEARNED_OF_TEXT if results.text else LEARNED


def _star(pair: Comparison, firm: set[int]) -> str:
    return " ★" if id(pair) in firm and pair.verdict != NOISE else ""


def _rule(results: Results, tested: list[Comparison], firm: set[int], left_out: int) -> str:
    text = (
        f"Differences are taken seed by seed, positive on the paper's side; held and reversed need Student's one-sided "
        f"{LEVEL:.0%} point, anything less is within the noise (p: two-sided). An order held in part when some of its "
        f"neighbours held and none is reversed, it is mixed when some are. {len(tested)} pairs are tested, of which "
        f"chance alone would call {2 * LEVEL * len(tested):.0f} held or reversed; ★: passes Holm's correction for all "
        "of them."
    )
    sizes = [f"{control(results, m):.{m.digits}f} by {m.name}" for m in LEARNED if m.above_perfect]
    if results.text:
        text += " How much of a difference is the decoders' was not controlled for here."
    elif all(map(results.seeds, CONTROL)):
        text += (
            " AlignTok and the row with Stage 3 have the same latents and the same generator, and still differ by up "
            f"to {' and '.join(sizes)}: that much is the decoders', and what is not larger counts as noise."
        )
    else:
        text += (
            " AlignTok with and without Stage 3, which show how much of this is the decoders', were not both trained."
        )
    if left_out:
        text += f" {left_out} more findings are about rows that were not trained."
    return text


def speed(results: Results) -> str:
    """Figure 4's claim, seed by seed."""
    metrics = (GFD, ABOVE, ABOVE_KD)
    lines = [["sooner", *(metric.name for metric in metrics)], ["---"] * (1 + len(metrics))]
    for faster, slower in SPEED_OF_TEXT if results.text else SPEED:
        if results.seeds(faster) and results.seeds(slower):
            found = [factors(results, faster, slower, metric) for metric in metrics]
            cells = [
                f"**{_judged(faster, slower, each)}** {', '.join(f'{x:.1f}' for x in sorted(each))}" for each in found
            ]
            lines.append([f"{NAMES[faster]} / {NAMES[slower]}", *cells])
    if len(lines) == 2:
        return "No two of the rows that the paper compares were trained."
    text = (
        "How many times sooner a row's generator is for good where the other's ends, one factor for each seed, "
        "interpolated between snapshots; one that is there at the first snapshot counts from there; below 1: the other "
        "one is sooner. The verdict is that on their logarithms."
    )
    text += "" if results.text else " The paper: about five times against VA-VAE."
    return f"{text}\n\n{markdown(lines)}"


def _judged(faster: str, slower: str, found: tuple[float, ...]) -> str:
    return Comparison(faster, slower, tuple(map(math.log, found)), digits=2).verdict
