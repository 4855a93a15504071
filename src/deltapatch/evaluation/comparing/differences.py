"""Differences between methods in words."""

from ..metrics import PairedDifference, Verdict
from ..protocols.seeds import SeedComparison
from ..wording import p_value, signed_points


def difference(compared: PairedDifference | SeedComparison) -> str:
    """As "better by 2.1 points (+0.3 to +3.9, p = 0.021)", or as a tie where it is inside the noise."""
    found = compared.difference
    evidence = f"{signed_points(found.low)} to {signed_points(found.high)}, {p_value(compared.p_value)}"
    verdict: Verdict = compared.verdict
    if verdict != "tie":
        return f"{verdict} by {100 * abs(found.value):.1f} points ({evidence})"
    if found.low != found.low:
        return f"tie ({signed_points(found.value)} points; one pair says nothing about chance)"
    return f"tie ({signed_points(found.value)} points, {evidence})"
