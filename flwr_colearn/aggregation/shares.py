"""Shares: the weights of a mean, of which none exceeds a largest share."""

from collections.abc import Mapping
from logging import WARNING

from flwr.common import log

from ..traffic import Event


def bounded_weights(weights: Mapping[str, float], largest_share: float) -> dict[str, float]:
    """Return weights of which none is more than a share of their sum.

    The weights beyond the bound are lowered to one common value, the largest one that is within it;
    the others stay as they are. Where the bound cannot be kept, since it is below 1/K, all weights
    are equal.

    Parameters
    ----------
    weights : mapping of str to float
        The participants' weights, positive.
    largest_share : float
        The largest share of one participant, above 0 and at most 1.

    Examples
    --------
    >>> bounded_weights({"a": 1000.0, "b": 30.0, "c": 20.0}, 0.5)
    {'a': 50.0, 'b': 30.0, 'c': 20.0}
    >>> bounded_weights({"a": 1000.0, "b": 30.0}, 0.4)
    {'a': 30.0, 'b': 30.0}
    """
    ordered = sorted(weights.values(), reverse=True)
    for lowered, largest in enumerate(ordered):
        # With `lowered` participants at the bound c: c = s (lowered c + rest).
        room = 1.0 - lowered * largest_share
        if room <= 0.0:
            break
        bound = largest_share * sum(ordered[lowered:]) / room
        if largest <= bound:
            return {name: min(weight, bound) for name, weight in weights.items()}
    return dict.fromkeys(weights, min(ordered, default=1.0))


def lowered_weights(
    examples: Mapping[str, float], largest_share: float
) -> tuple[dict[str, float], list[Event]]:
    """Return the weights that are lowered to the largest share, and a warning for each.

    Parameters
    ----------
    examples : mapping of str to float
        The participants' numbers of examples.
    largest_share : float
        See `bounded_weights`.
    """
    bounded = bounded_weights(examples, largest_share)
    lowered = {name: weight for name, weight in bounded.items() if weight != examples[name]}
    warnings = []
    for name, weight in lowered.items():
        reason = (
            f"number of examples: {examples[name]:g} would be more than a share of "
            f"{largest_share:g} of all, so its weight is {weight:g}"
        )
        log(WARNING, "CoLearn: participant %s: %s", name, reason)
        warnings.append(Event("warning", name, reason))
    return lowered, warnings
