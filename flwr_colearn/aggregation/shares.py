"""Shares: the weights of a mean, of which none exceeds a largest share."""

from collections.abc import Mapping


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
