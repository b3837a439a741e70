"""The state of a strategy between rounds, saved in checkpoints and restored on resume."""

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.common import log
from flwr.serverapp.strategy import FedAvgM, Strategy

from .errors import ColearnError
from .records import to_record, view
from .roles import NDArray

SAVED = ("m_t", "v_t", "momentum_vector", "clipping_norm", "accountant")
"""The attributes with the state of Flower's strategies and privacy wrappers: FedOpt's moments,
FedAvgM's momentum, the norm of adaptive clipping, the privacy budget spent so far."""

RENEWED = ("current_arrays",)
"""The attributes that they set in every round; only FedAvgM's differs from the shared model."""

State = tuple[dict[str, Any], dict[str, NDArray]]
"""A state: the part in types of JSON, and arrays by name."""


def save_state(strategy: Strategy) -> State:
    """Return the state of a strategy and of the strategies that it wraps.

    A strategy's state is the return value of its ``strategy_state() -> (json, arrays)``. Flower's
    own strategies have no such method; theirs consists of the attributes in `SAVED`.
    """
    state: dict[str, Any] = {}
    arrays: dict[str, NDArray] = {}
    for depth, each in enumerate(chain_of(strategy)):
        own, own_arrays = _state_of(each)
        state[str(depth)] = own
        arrays.update({f"{depth}/{name}": array for name, array in own_arrays.items()})
    return state, arrays


def restore_state(strategy: Strategy, saved: State) -> None:
    """Restore the state that `save_state` returned.

    Raises
    ------
    ColearnError
        If the state is of another number of strategies.
    """
    state, arrays = saved
    strategies = list(chain_of(strategy))
    if set(state) != {str(depth) for depth in range(len(strategies))}:
        raise ColearnError(
            f"checkpoint: expected the state of {len(strategies)} strategies, one around the "
            f"other, found {len(state)}; use another folder, or the old strategy"
        )
    for depth, each in enumerate(strategies):
        prefix = f"{depth}/"
        own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        restore = getattr(each, "restore_strategy_state", None)
        if restore is not None:
            restore(state[str(depth)], own)
        else:
            _restore_attributes(each, state[str(depth)], own)


def chain_of(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy, then the one that it wraps, and so on inwards."""
    inner: Any = strategy
    while isinstance(inner, Strategy):
        yield inner
        inner = getattr(inner, "strategy", None)


class ForgottenAttributes:
    """Finds attributes that change from round to round and that no checkpoint contains.

    Parameters
    ----------
    strategy : Strategy
        The strategy to examine, with those that it wraps.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._before = self._seen()
        self._named: set[str] = set()

    def warn(self) -> None:
        """Log a warning for attributes that changed since the last call, each once."""
        now = self._seen()
        changed = {name for name in now if name in self._before and now[name] != self._before[name]}
        # Attributes that a round has added are state as well.
        changed |= set(now) - set(self._before)
        self._before = now
        if new := sorted(changed - self._named):
            self._named |= changed
            log(
                WARNING,
                "Run: %s changed in this round and will not be restored when the run is resumed. "
                "Give the strategy strategy_state() -> (json, arrays) and "
                "restore_strategy_state(json, arrays) if it matters",
                ", ".join(new),
            )

    def _seen(self) -> dict[str, object]:
        """Return a digest of every attribute that checkpoints do not contain."""
        return {
            f"{type(each).__name__}.{name}": _digest(value)
            for each in chain_of(self._strategy)
            if not hasattr(each, "strategy_state")
            for name, value in vars(each).items()
            if name not in SAVED + RENEWED and not isinstance(value, Strategy)
        }


def _state_of(strategy: Strategy) -> State:
    own = getattr(strategy, "strategy_state", None)
    if own is not None:
        state, arrays = own()
        return dict(state), dict(arrays)
    return _attributes_of(strategy)


def _attributes_of(strategy: Strategy) -> State:
    """Return Flower's known attributes; arrays under ``attribute/name`` or ``attribute/index``."""
    state: dict[str, Any] = {}
    arrays: dict[str, NDArray] = {}
    # The type of an attribute's value is saved with it, since a strategy that was just created has
    # None in most of them and so does not show what to restore.
    for attribute in SAVED + (RENEWED if isinstance(strategy, FedAvgM) else ()):
        value = vars(strategy).get(attribute)
        if value is None:
            continue
        if isinstance(value, int | float):
            state[attribute] = value
            continue
        # Flower's privacy accountant, which restores itself.
        if hasattr(value, "state_dict"):
            state[attribute] = {"state_dict": value.state_dict()}
            continue
        kind, named = _named_arrays(value)
        state[attribute] = kind
        arrays.update({f"{attribute}/{name}": array for name, array in named.items()})
    return state, arrays


def _named_arrays(value: Any) -> tuple[str, dict[str, NDArray]]:
    if isinstance(value, ArrayRecord):
        return "record", dict(view(value))
    if isinstance(value, Mapping):
        return "mapping", {str(name): np.asarray(array) for name, array in value.items()}
    return "list", {str(index): np.asarray(array) for index, array in enumerate(value)}


def _restore_attributes(
    strategy: Strategy, state: Mapping[str, Any], arrays: Mapping[str, NDArray]
) -> None:
    for attribute, kind in state.items():
        if isinstance(kind, Mapping):
            getattr(strategy, attribute).load_state_dict(kind["state_dict"])
            continue
        if not isinstance(kind, str):
            setattr(strategy, attribute, kind)
            continue
        prefix = f"{attribute}/"
        named = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        value: Any = named
        if kind == "record":
            value = to_record(named)
        elif kind == "list":
            value = [named[str(index)] for index in range(len(named))]
        setattr(strategy, attribute, value)


def _digest(value: object) -> object:
    """Return a digest of a value, or its identity if it has no digest."""
    try:
        # The digest of a pickle is safe, since the pickle is never loaded.
        return hashlib.sha256(pickle.dumps(value)).digest()
    except Exception:  # functions, locks, open files and the like cannot be pickled
        return id(value)
