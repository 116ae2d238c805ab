"""A comparison of candidates in words: what wins, what another criterion would have cost, what did not help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distckpt.selection.evaluation import value_and_n
from distckpt.selection.statistics import Comparison

if TYPE_CHECKING:
    from distckpt.selection.compare import CandidateComparison, Row

BEST_BY = "best single by "


def verdict(c: CandidateComparison) -> list[str]:
    """Return the recommendation and its reasons, a sentence or two each."""
    single, chosen = c.row(c.single), c.row(c.chosen)
    parts = [[_first(c, single, chosen)], _on_test(c, single, chosen), _criteria(c, single), _helped(c), _fine_print(c)]
    return [sentence for part in parts for sentence in part]


def shown_apart(found: Comparison | None, mode: str, sign: int) -> bool:
    """Whether the rows show a candidate better (sign 1) or worse (-1) than the best single checkpoint."""
    return found is not None and not found.tied and sign * _gain(found, mode) > 0


def _gain(found: Comparison, mode: str) -> float:
    """Return by how much it is better than the best single checkpoint; negative where it is worse."""
    return found.difference.value if mode == "max" else -found.difference.value


def _versus(found: Comparison) -> str:
    d = found.difference
    return f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}], p={found.p_holm:.2g}"


def _first(c: CandidateComparison, single: Row, chosen: Row) -> str:
    held = f"{c.single}, {c.metric} {value_and_n(single.validation, c.metric)} on validation"
    if chosen is single:
        return f"The single best wins: {held}; no other candidate is better by the rule."
    if chosen.against is None:
        return f"The single best stays: {held}. {c.chosen} comes first by the rule, but cannot be tested on {c.metric}."
    if c.recommended == c.chosen:
        many = f" It runs {chosen.models} models for each row." if chosen.models > 1 else ""
        return f"{c.chosen} wins: {_versus(chosen.against)} on validation against the best single ({held}).{many}"
    return (
        f"The single best stays: {held}. {c.chosen} comes first by the rule, but these rows do not tell the two apart "
        f"({_versus(chosen.against)}), and the single checkpoint is the plainer one."
    )


def _on_test(c: CandidateComparison, single: Row, chosen: Row) -> list[str]:
    winner = c.winner
    if winner.test is None:
        return ["There is no test set here, so how good it is on rows that had no part in the choice is not known."]
    interval = winner.test_intervals.get(c.metric)
    ends = "" if interval is None else f", {1 - c.alpha:.0%} interval {interval.low:.4f} to {interval.high:.4f}"
    value = value_and_n(winner.test, c.metric)
    out = [f"On the test set, which had no part in the choice, {winner.name} has {c.metric} {value}{ends}."]
    if chosen is not single and chosen.against_test is not None:
        out.append(f"There {chosen.name} is {_versus(chosen.against_test)} against {single.name}.")
    above = [
        f"{row.name} ({_versus(row.against_test)})"
        for row in c.rows
        if row is not winner and row.against_test is not None and shown_apart(row.against_test, c.mode, 1)
    ]
    if above:
        out.append(
            f"The test set shows {', '.join(above)} above {single.name}: a reason to look again with new validation rows, "
            "not to choose by the test set."
        )
    return out


def _criteria(c: CandidateComparison, single: Row) -> list[str]:
    """Say what choosing a single checkpoint by something else would have cost."""
    out = []
    best = single.validation.metrics.get(c.metric)
    for row in c.rows:
        mine = row.validation.metrics.get(c.metric)
        if row is single or row.kind != "single" or not row.how.startswith(BEST_BY) or mine is None or best is None:
            continue
        by = row.how.removeprefix(BEST_BY).removesuffix(", newest")
        lost = f": {1 - mine / best:.0%} of what is reachable given up" if c.mode == "max" and best > mine >= 0 else ""
        out.append(f"Choosing by {by} takes {row.name}, {c.metric} {value_and_n(row.validation, c.metric)}{lost}.")
    return out


def _helped(c: CandidateComparison) -> list[str]:
    made = [(row, row.against) for row in c.rows if row.kind != "single" and row.against is not None]
    groups = {
        "better": [row.name for row, against in made if shown_apart(against, c.mode, 1)],
        "not told apart": [row.name for row, against in made if against.tied],
        "worse": [row.name for row, against in made if shown_apart(against, c.mode, -1)],
    }
    told = [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]
    return [f"Averages, EMA and ensembles against {c.single} on validation: {'; '.join(told)}."] if told else []


def _fine_print(c: CandidateComparison) -> list[str]:
    looks = (
        f"{c.looks} candidates were scored on validation. The best single was chosen on the same rows, which flatters it; "
        "tests are paired, and corrected for their number (Holm)."
    )
    return [looks, *(f"Left out: {reason}." for reason in c.left_out)]
