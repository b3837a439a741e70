"""Which epsilon would double T when: the paper gives none."""

from dataclasses import replace

from clients.settings import ParticipantSettings
from flwr_colearn.errors import whole_number
from simulations.arms import arm_named
from simulations.settings import RunSettings
from simulations.study.training import train_averaged

ARM = "clr-fle"


def calibrate(participants: ParticipantSettings, settings: RunSettings, rounds: int) -> str:
    """Train some rounds of T0 epochs each, and return the table of `epsilon_table`."""
    from tabulate import tabulate

    whole_number("--calibrate", rounds, least=1)
    short = replace(settings, num_server_rounds=rounds, total_epochs=0)
    history = train_averaged(ARM, arm_named(ARM), participants, short)
    changes = [float(record.relative_change or 0.0) for record in history]
    table = tabulate(epsilon_table(changes), headers="keys", tablefmt="github", floatfmt=".4g")
    return f"{table}\n\nT doubles after a round whose relative change is at most epsilon (eq. 4)."


def epsilon_table(changes: list[float]) -> list[dict[str, float | int | str]]:
    """Return for each round its relative change, and the epsilons that double T first after it.

    Parameters
    ----------
    changes : list of float
        |w^{i+1} - w^i| / |w^i| of the rounds, in order.

    Examples
    --------
    >>> for row in epsilon_table([0.5, 0.25, 0.3]):
    ...     print(list(row.values()))
    [1, 0.5, '0.5 or more']
    [2, 0.25, '0.25 to 0.5']
    [3, 0.3, 'none']
    """
    rows: list[dict[str, float | int | str]] = []
    for index, change in enumerate(changes):
        least = min(changes[:index], default=None)
        if least is None:
            epsilon = f"{change:.4g} or more"
        else:
            epsilon = f"{change:.4g} to {least:.4g}" if change < least else "none"
        rows.append(
            {"round": index + 1, "relative change": change, "epsilon of a first doubling": epsilon}
        )
    return rows
