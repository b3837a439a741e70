"""The paper's claims, and what our results say of each."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from simulations.arms import ARMS
from simulations.study.training import ArmUnit

Units = Sequence[ArmUnit]
Claims = Mapping[str, "Callable[[Units], Finding | None]"]
FOUR_ARMS = ("clr-ile", "clr-fle", "elr-ile", "elr-fle")
ENSEMBLE_LOSS = 7.0
"""Points of accuracy behind vanilla learning from which on the ensemble is "about 10" behind."""


@dataclass(frozen=True)
class Finding:
    """What one study says of a claim: yes, no or undecided, by how few seeds, and the figures."""

    verdict: str
    evidence: str


def claims_table(studies: Mapping[str, Units], claims: Claims | None = None) -> str:
    """Return the Markdown table of claims and findings; "not run" where no study has the arms."""
    from tabulate import tabulate

    table = []
    for claim, finder in (claims or CLAIMS).items():
        findings = {name: finder(units) for name, units in studies.items()}
        found = {name: finding for name, finding in findings.items() if finding is not None}
        for name, finding in found.items():
            verdict, evidence = finding.verdict, finding.evidence
            table.append({"claim": claim, "study": name, "ours": verdict, "evidence": evidence})
        if not found:
            table.append({"claim": claim, "study": "", "ours": "not run", "evidence": ""})
    text: str = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    return text


def scores(units: Units, arm: str) -> list[float]:
    """Return the headline metric of an arm's runs, in percent."""
    return [unit.score for unit in units if unit.arm == arm]


def compare(first: Sequence[float], second: Sequence[float], tie: str = "no") -> Finding:
    """Say whether the first scores are higher than the second.

    Parameters
    ----------
    first, second : sequence of float
        One score a seed.
    tie : str
        The verdict on a single pair of equal scores.

    Returns
    -------
    Finding
        Undecided within twice the standard error of the difference of the means. With a single
        run on either side there is no such error: the direction, and "one seed".
    """
    difference = statistics.mean(first) - statistics.mean(second)
    evidence = f"{difference:+.2f}"
    if math.isnan(difference):
        return Finding("undecided", evidence)
    if min(len(first), len(second)) < 2:
        verdict = tie if difference == 0 else "yes" if difference > 0 else "no"
        return Finding(f"{verdict}, {ONE_SEED}", evidence)
    error = math.sqrt(
        statistics.variance(first) / len(first) + statistics.variance(second) / len(second)
    )
    evidence = f"{evidence} (± {error:.2f})"
    if abs(difference) <= 2 * error:
        return Finding("undecided", evidence)
    return Finding("yes" if difference > 0 else "no", evidence)


ONE_SEED = "one seed"
_GRAVEST = ("no", "undecided", f"no, {ONE_SEED}", f"yes, {ONE_SEED}", "yes")
"""Verdicts on one of several conditions, the one that decides on all of them first."""


def finding_of(holds: bool, evidence: str, units: Units, arms: Sequence[str]) -> Finding:
    """Return a finding by the means, which says if it rests on a single seed of some arm."""
    fewest = min(len(scores(units, arm)) for arm in arms)
    verdict = "yes" if holds else "no"
    return Finding(f"{verdict}, {ONE_SEED}" if fewest < 2 else verdict, evidence)


def best_of_four(units: Units) -> Finding | None:
    """Compare CLR+ILE with the three other arms."""
    runs = {arm: scores(units, arm) for arm in FOUR_ARMS}
    if not all(runs.values()):
        return None
    findings = {arm: compare(runs["clr-ile"], runs[arm]) for arm in FOUR_ARMS[1:]}
    verdict = min((each.verdict for each in findings.values()), key=_GRAVEST.index)
    evidence = ", ".join(f"{ARMS[arm].title} {each.evidence}" for arm, each in findings.items())
    return Finding(verdict, f"CLR+ILE against {evidence}")


def epochs_before_rates(units: Units) -> Finding | None:
    """Compare the effect of ILE over FLE with that of CLR over ELR, on the mean score."""
    runs = {arm: scores(units, arm) for arm in FOUR_ARMS}
    if not all(runs.values()):
        return None
    means = {arm: statistics.mean(values) for arm, values in runs.items()}
    increasing = (means["clr-ile"] + means["elr-ile"] - means["clr-fle"] - means["elr-fle"]) / 2
    cyclical = (means["clr-ile"] + means["clr-fle"] - means["elr-ile"] - means["elr-fle"]) / 2
    evidence = f"ILE {increasing:+.2f}, CLR {cyclical:+.2f}"
    return finding_of(increasing > max(cyclical, 0), evidence, units, FOUR_ARMS)


def better_after_doublings(units: Units) -> Finding | None:
    """Compare the gain of the first round after each doubling with the last one before it."""
    if not scores(units, "clr-ile"):
        return None
    before, after = [], []
    for unit in units:
        for epoch in unit.doublings if unit.arm == "clr-ile" else []:
            index = unit.epochs.index(epoch)
            if 0 < index < len(unit.epochs) - 1:
                before.append(100 * (unit.values[index] - unit.values[index - 1]))
                after.append(100 * (unit.values[index + 1] - unit.values[index]))
    if not before:
        return Finding("undecided", "T was not doubled in between")
    gain, usual = statistics.mean(after), statistics.mean(before)
    evidence = (
        f"{gain:+.2f} in the round after, of twice the epochs, {usual:+.2f} in the round before; "
        f"doublings: {len(after)}"
    )
    return finding_of(gain > max(usual, 0), evidence, units, ["clr-ile"])


def ensemble_far_behind(units: Units) -> Finding | None:
    """Compare vanilla learning with the ensemble, where points of accuracy are what is lost."""
    vanilla, ensemble = scores(units, "vanilla-elr"), scores(units, "ensemble")
    if not vanilla or not ensemble or units[0].headline != "accuracy":
        return None
    loss = statistics.mean(vanilla) - statistics.mean(ensemble)
    holds = loss >= ENSEMBLE_LOSS
    return finding_of(holds, f"{loss:.2f} behind", units, ["vanilla-elr", "ensemble"])


def at_least_vanilla(units: Units) -> Finding | None:
    """Compare co-learning with vanilla learning, of both rates."""
    ours = scores(units, "clr-ile")
    others = {arm: scores(units, arm) for arm in ("vanilla-elr", "vanilla-clr")}
    findings = {
        arm: compare(ours, runs, tie="yes") for arm, runs in others.items() if ours and runs
    }
    if "vanilla-elr" not in findings:
        return None
    evidence = ", ".join(f"{ARMS[arm].title} {each.evidence}" for arm, each in findings.items())
    return Finding(findings["vanilla-elr"].verdict, f"against {evidence}")


def intervals_stretch(units: Units) -> Finding | None:
    """Compare the seconds of rounds of 2 T0 epochs with those of T0."""
    if not scores(units, "clr-ile"):
        return None
    ratios = []
    for unit in units:
        if unit.arm == "clr-ile" and unit.doublings and unit.interval:
            lengths = [b - a for a, b in itertools.pairwise([0, *unit.epochs])]
            later = [
                seconds
                for seconds, length in zip(unit.round_seconds, lengths, strict=True)
                if length == 2 * lengths[0]
            ]
            if later:
                ratios.append(statistics.mean(later) / unit.interval)
    if not ratios:
        return Finding("undecided", "T was not doubled, or rounds were not timed")
    ratio = statistics.mean(ratios)
    evidence = f"rounds of 2 T0 take {ratio:.2f} times as long"
    return finding_of(ratio > 1.5, evidence, units, ["clr-ile"])


CLAIMS: Claims = {
    "1. CLR+ILE is the best of the four arms": best_of_four,
    "2. ILE gains more than CLR": epochs_before_rates,
    "3. After each doubling the shared model improves clearly": better_after_doublings,
    "4. The ensemble loses about 10 points to vanilla": ensemble_far_behind,
    "5. Co-learning is at least as good as vanilla": at_least_vanilla,
    "6. Doubling T stretches the communication interval": intervals_stretch,
}
