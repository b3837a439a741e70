"""The paper's claims, and what our results say of each."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from simulations.arms import ARMS
from simulations.training import ArmUnit

Units = Sequence[ArmUnit]
FOUR_ARMS = ("clr-ile", "clr-fle", "elr-ile", "elr-fle")
ENSEMBLE_LOSS = 7.0
"""Points behind vanilla learning from which on we count the ensemble as "about 10" behind."""


@dataclass(frozen=True)
class Finding:
    """What one study says of a claim: ``yes``, ``no`` or ``undecided``, and the figures."""

    verdict: str
    evidence: str


def claims_table(studies: Mapping[str, Units]) -> str:
    """Return the Markdown table of claims and findings; "not run" where no study has the arms."""
    from tabulate import tabulate

    table = []
    for claim, judge in CLAIMS.items():
        findings = {name: judge(units) for name, units in studies.items()}
        found = {name: finding for name, finding in findings.items() if finding is not None}
        for name, finding in found.items():
            verdict, evidence = finding.verdict, finding.evidence
            table.append({"claim": claim, "study": name, "ours": verdict, "evidence": evidence})
        if not found:
            table.append({"claim": claim, "study": "", "ours": "not run", "evidence": ""})
    return tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)


def scores(units: Units, arm: str) -> list[float]:
    """Return the headline metric of an arm's runs, in percent."""
    return [unit.score for unit in units if unit.arm == arm]


def compare(first: Sequence[float], second: Sequence[float]) -> Finding:
    """Say whether the first scores are higher than the second.

    Returns
    -------
    Finding
        Undecided within twice the standard error of the difference of the means. With a single
        run on either side there is no such error: the direction, and "one seed".
    """
    difference = statistics.mean(first) - statistics.mean(second)
    evidence = f"{difference:+.2f}"
    if min(len(first), len(second)) < 2:
        return Finding("yes, one seed" if difference > 0 else "no, one seed", evidence)
    error = math.sqrt(
        statistics.variance(first) / len(first) + statistics.variance(second) / len(second)
    )
    evidence = f"{evidence} (± {error:.2f})"
    if abs(difference) <= 2 * error:
        return Finding("undecided", evidence)
    return Finding("yes" if difference > 0 else "no", evidence)


def best_of_four(units: Units) -> Finding | None:
    """Compare CLR+ILE with the three other arms."""
    runs = {arm: scores(units, arm) for arm in FOUR_ARMS}
    if not all(runs.values()):
        return None
    findings = {arm: compare(runs["clr-ile"], runs[arm]) for arm in FOUR_ARMS[1:]}
    verdicts = [finding.verdict for finding in findings.values()]
    evidence = ", ".join(f"{ARMS[arm].title} {each.evidence}" for arm, each in findings.items())
    return Finding(_all_of(verdicts), f"CLR+ILE against {evidence}")


def _all_of(verdicts: Sequence[str]) -> str:
    """Return the verdict on "all of them": one no is enough to refute."""
    for word in ("no", "undecided"):
        matching = [verdict for verdict in verdicts if verdict.startswith(word)]
        if matching:
            return matching[0]
    return verdicts[0]


def epochs_before_rates(units: Units) -> Finding | None:
    """Compare the effect of ILE over FLE with that of CLR over ELR, on the mean score."""
    runs = {arm: scores(units, arm) for arm in FOUR_ARMS}
    if not all(runs.values()):
        return None
    means = {arm: statistics.mean(values) for arm, values in runs.items()}
    increasing = (means["clr-ile"] + means["elr-ile"] - means["clr-fle"] - means["elr-fle"]) / 2
    cyclical = (means["clr-ile"] + means["clr-fle"] - means["elr-ile"] - means["elr-fle"]) / 2
    evidence = f"ILE {increasing:+.2f}, CLR {cyclical:+.2f}"
    verdict = "yes" if increasing > max(cyclical, 0) else "no"
    single = min(map(len, runs.values())) < 2
    return Finding(f"{verdict}, one seed" if single else f"{verdict}, by the means", evidence)


def better_after_doublings(units: Units) -> Finding | None:
    """Compare the gain of the first round after each doubling with the last one before it."""
    before, after = [], []
    for unit in units:
        if unit.arm != "clr-ile":
            continue
        for epoch in unit.doublings:
            index = unit.epochs.index(epoch)
            if 0 < index < len(unit.epochs) - 1:
                before.append(100 * (unit.values[index] - unit.values[index - 1]))
                after.append(100 * (unit.values[index + 1] - unit.values[index]))
    if not before:
        return None
    gain, usual = statistics.mean(after), statistics.mean(before)
    evidence = f"{gain:+.2f} after, {usual:+.2f} before; {len(after)} doublings"
    return Finding("yes" if gain > max(usual, 0) else "no", evidence)


def ensemble_far_behind(units: Units) -> Finding | None:
    """Compare vanilla learning with the ensemble."""
    vanilla, ensemble = scores(units, "vanilla-elr"), scores(units, "ensemble")
    if not vanilla or not ensemble:
        return None
    loss = statistics.mean(vanilla) - statistics.mean(ensemble)
    return Finding("yes" if loss >= ENSEMBLE_LOSS else "no", f"{loss:.2f} behind")


def at_least_vanilla(units: Units) -> Finding | None:
    """Compare co-learning with vanilla learning, of both rates."""
    ours = scores(units, "clr-ile")
    others = {arm: scores(units, arm) for arm in ("vanilla-elr", "vanilla-clr")}
    findings = {arm: compare(ours, runs) for arm, runs in others.items() if ours and runs}
    if "vanilla-elr" not in findings:
        return None
    evidence = ", ".join(f"{ARMS[arm].title} {each.evidence}" for arm, each in findings.items())
    return Finding(findings["vanilla-elr"].verdict, f"against {evidence}")


def intervals_stretch(units: Units) -> Finding | None:
    """Compare the seconds of rounds of 2 T0 epochs with those of T0."""
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
        return None
    ratio = statistics.mean(ratios)
    return Finding("yes" if ratio > 1.5 else "no", f"rounds of 2 T0 take {ratio:.2f} times as long")


CLAIMS: dict[str, Callable[[Units], Finding | None]] = {
    "1. CLR+ILE is the best of the four arms": best_of_four,
    "2. ILE gains more than CLR": epochs_before_rates,
    "3. After each doubling the shared model improves clearly": better_after_doublings,
    "4. The ensemble loses about 10 points to vanilla": ensemble_far_behind,
    "5. Co-learning is at least as good as vanilla": at_least_vanilla,
    "6. Doubling T stretches the communication interval": intervals_stretch,
}
