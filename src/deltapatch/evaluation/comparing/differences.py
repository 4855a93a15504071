"""Differences between methods in words."""

from ..metrics import PairedDifference, Verdict
from ..protocols.seeds import SeedComparison


def difference(compared: PairedDifference | SeedComparison) -> str:
    """As "better by 2.1 points (+0.3 to +3.9, p = 0.021)", or as a tie where it is inside the noise."""
    found = compared.difference
    evidence = f"{_points(found.low)} to {_points(found.high)}, {_chance(compared.p_value)}"
    verdict: Verdict = compared.verdict
    if verdict != "tie":
        return f"{verdict} by {100 * abs(found.value):.1f} points ({evidence})"
    if found.low != found.low:
        return f"tie ({_points(found.value)} points; one pair says nothing about chance)"
    return f"tie ({_points(found.value)} points, {evidence})"


def _chance(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _points(part: float) -> str:
    # A true minus, and no sign on what rounds to nothing.
    text = f"{100 * part:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\u2212")
