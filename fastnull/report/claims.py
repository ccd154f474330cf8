"""Statements about one method against another, with confidence intervals.

Runs are paired by seed: both start from the same pretrained weights. A claim holds, or fails, if the 95 % confidence
interval of the paired difference (Student's t over the seeds) is on one side of its threshold. Fewer than three seeds
give no claim.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Scores: TypeAlias = Mapping[str, Mapping[int, Mapping[str, "float | None"]]]
"""Method → seed → measure → value in %."""

MEASURES = {"adversarial_mean": "under attack", "corruption_mean": "under corruption", "clean": "on clean images"}
"""Compared measures, in % (more is better) → their words in a sentence."""

SEEDS_NEEDED = 3
CLEAN_MARGIN = 1.0
"""Points of clean accuracy that a method may lose."""


@dataclass(frozen=True)
class Comparison:
    """One method minus another on one measure.

    Attributes:
        differences: method − other in percentage points, one per common seed.
    """

    method: str
    other: str
    measure: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean paired difference in points."""
        return statistics.fmean(self.differences)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; None with fewer than three seeds."""
        count = len(self.differences)
        return statistics.stdev(self.differences) / math.sqrt(count) if count >= SEEDS_NEEDED else None

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % confidence interval; None with fewer than three seeds."""
        error = self.standard_error
        if error is None:
            return None
        try:
            from scipy.special import stdtrit
        except ImportError as missing:
            raise ImportError(f"intervals need scipy: pip install fastnull[demo] ({missing})") from missing
        return error * float(stdtrit(len(self.differences) - 1, 0.975))  # Student's t


@dataclass(frozen=True)
class Claim:
    """The claim that the difference of a comparison is above a threshold in points.

    Attributes:
        name, other_name: of the methods, in a sentence.
    """

    comparison: Comparison
    name: str
    other_name: str
    threshold: float = 0.0

    @property
    def outcome(self) -> str:
        """`holds` or `fails` if the 95 % interval is above or below the threshold, `open` if it contains it, `untested`
        with fewer than three seeds."""
        margin = self.comparison.margin
        if margin is None:
            return "untested"
        above = self.comparison.mean - self.threshold
        if abs(above) <= margin:
            return "open"
        return "holds" if above > 0 else "fails"

    def numbers(self) -> str:
        """Mean difference, with its standard error if known."""
        error = self.comparison.standard_error
        return signed(self.comparison.mean) + ("" if error is None else f" ± {error:.1f}")

    def interval(self) -> str:
        """The 95 % confidence interval; a dash with fewer than three seeds."""
        margin = self.comparison.margin
        if margin is None:
            return "–"
        return f"{signed(self.comparison.mean - margin)} to {signed(self.comparison.mean + margin)}"


_SENTENCES = {
    # (outcome, whether on clean images) → sentence
    ("holds", False): "{name} is more accurate {where} than {others}",
    ("fails", False): "{name} is less accurate {where} than {others}",
    ("open", False): "{name} is not significantly more or less accurate {where} than {others}",
    ("untested", False): "{name} {where}, against {others}",
    ("holds", True): "{name} loses less than {margin:g} point {where} against {others}",
    ("fails", True): "{name} loses more than {margin:g} point {where} against {others}",
    ("open", True): "{name} may or may not lose more than {margin:g} point {where} against {others}",
    ("untested", True): "{name} {where}, against {others}",
}


def sentences(claims: Sequence[Claim], outcome: str) -> list[str]:
    """Sentences for the claims of one outcome, one per method and measure, with the baselines and numbers."""
    found: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        if claim.outcome == outcome:
            found.setdefault((claim.name, claim.comparison.measure), []).append(claim)
    result = []
    for (name, measure), group in found.items():
        listed = [f"{claim.other_name} (**{claim.numbers()}**)" for claim in group]
        others = " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
        template = _SENTENCES[outcome, measure == "clean"]
        text = template.format(name=name, where=MEASURES[measure], others=others, margin=CLEAN_MARGIN)
        result.append(text[0].upper() + text[1:])
    return result


def signed(value: float) -> str:
    """A number with its sign, with a real minus instead of a hyphen."""
    return f"{value:+.1f}".replace("-", "−")


def compare(scores: Scores, method: str, other: str, measure: str) -> Comparison | None:
    """Pair two methods by seed; None if they have no common seed with that measure."""
    mine, theirs = scores.get(method, {}), scores.get(other, {})
    pairs = [(mine[seed].get(measure), theirs[seed].get(measure)) for seed in sorted(mine.keys() & theirs.keys())]
    differences = tuple(a - b for a, b in pairs if a is not None and b is not None)
    return Comparison(method, other, measure, differences) if differences else None


def make_claims(
    scores: Scores, methods: Mapping[str, str], baselines: Mapping[str, str], clean_baseline: str | None = None
) -> list[Claim]:
    """Claims of every method against every baseline under attack and corruption, and about its clean accuracy.

    Args:
        scores: method → seed → measure → value in %.
        methods, baselines: label → name in a sentence.
        clean_baseline: the baseline for clean accuracy.
    """
    claims = []
    for measure in ("adversarial_mean", "corruption_mean"):
        for method, name in methods.items():
            for other, other_name in baselines.items():
                comparison = compare(scores, method, other, measure) if method != other else None
                if comparison is not None:
                    claims.append(Claim(comparison, name, other_name))
    for method, name in methods.items():
        if clean_baseline is None or clean_baseline == method:
            continue
        comparison = compare(scores, method, clean_baseline, "clean")
        if comparison is not None:
            claims.append(Claim(comparison, name, baselines[clean_baseline], threshold=-CLEAN_MARGIN))
    return claims
