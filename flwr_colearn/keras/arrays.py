"""A Keras model's arrays by name, and their roles."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ..aggregation import check_weights
from ..roles import NDArray, Role


def get_arrays(model: keras.Model) -> dict[str, NDArray]:
    """Return copies of a model's arrays, by names that are the same at every participant.

    A name consists of the layers' types and their order, ``resnet_block_1/conv2d/kernel``. Keras's
    own names (``variable.path``) count all layers that a process has made (``dense_7``), so they
    may differ between participants. The states of random layers are left out, since they are no
    weights.

    bfloat16, and the other floats that numpy does not have, become float32, which has each of their
    numbers; the server averages in float32, and `set_arrays` rounds to the model's own type.
    """
    return {name: as_array(variable) for name, variable, _ in named_variables(model)}


def as_array(variable: Any) -> NDArray:
    """Return a copy of a variable or tensor; bfloat16 and 8-bit floats become float32."""
    array = np.array(variable.numpy())
    return array if array.dtype.kind != "V" else array.astype(np.float32)


def assign_all(variables: Mapping[str, Any], arrays: Mapping[str, NDArray], what: str) -> None:
    """Assign arrays to variables, rounded to types that numpy does not have.

    Parameters
    ----------
    variables : mapping
        The variables of Keras or TensorFlow, by name.
    arrays : mapping
        An array for each of them, of the type of `as_array`.
    what : str
        What they belong to, for the error message.

    Raises
    ------
    ColearnError
        If names, shapes or types differ; no variable has changed then.
    """
    # TensorFlow's arrays of such types are accepted too, such as those of model.get_weights().
    arrays = {
        name: array.astype(np.float32) if array.dtype.kind == "V" else array
        for name, array in arrays.items()
    }
    check_weights(arrays, {name: _Sent.of(variable) for name, variable in variables.items()}, what)
    for name, variable in variables.items():
        variable.assign(tf.cast(arrays[name], variable.dtype))


def load(
    model: keras.Model, variables: Mapping[str, Any], arrays: Mapping[str, NDArray], what: str
) -> bool:
    """Assign arrays to a model's variables, and let layers compute what they derive from them.

    ``keras.layers.Normalization``, and layers of a user's own with a method ``finalize_state``,
    compute with tensors that are made from their variables, and not with the variables. Functions
    that were traced have the former tensors in them, so those of ``fit``, ``evaluate`` and
    ``predict`` are traced again.

    Parameters
    ----------
    variables, arrays, what
        As for `assign_all`.

    Returns
    -------
    bool
        Whether such tensors have changed, so that the caller's own functions must be traced again.
    """
    deriving = [layer for layer in model._flatten_layers() if _derives(layer)]
    before = [as_array(variable) for layer in deriving for variable in layer.weights]
    assign_all(variables, arrays, what)
    after = [as_array(variable) for layer in deriving for variable in layer.weights]
    for layer in deriving:
        layer.finalize_state()
    if all(map(np.array_equal, before, after)):
        return False
    for function in ("train_function", "test_function", "predict_function"):
        if hasattr(model, function):
            setattr(model, function, None)
    return True


def _derives(layer: Any) -> bool:
    # Lookups and discretization have the method too, but no variables to derive anything from.
    return callable(getattr(layer, "finalize_state", None)) and bool(layer.weights)


@dataclass(frozen=True)
class _Sent:
    """The shape and type of a variable's array."""

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, variable: Any) -> "_Sent":
        dtype = np.dtype(tf.as_dtype(variable.dtype).as_numpy_dtype)
        return cls(tuple(variable.shape), np.dtype(np.float32) if dtype.kind == "V" else dtype)


def set_arrays(model: keras.Model, arrays: Mapping[str, NDArray]) -> None:
    """Load arrays into a model, so that models with equal arrays give equal predictions.

    Parameters
    ----------
    model : keras.Model
        A built model.
    arrays : mapping
        The arrays by the names of `get_arrays`, by Keras's paths, or numbered in the order of
        ``model.get_weights()``, as in ``ArrayRecord(model.get_weights())``.

    Raises
    ------
    ColearnError
        If names, shapes or types differ from the model's.
    """
    load(model, variables_as(model, arrays), arrays, f"Keras model '{model.name}'")


def variables_as(model: keras.Model, names: Iterable[str]) -> dict[str, Any]:
    """Return a model's variables by the one of the three kinds of names that `names` are.

    If they are none of the three, the variables have the names of `get_arrays`.
    """
    ours = {name: variable for name, variable, _ in named_variables(model)}
    numbered = {str(index): variable for index, variable in enumerate(model.weights)}
    # The states of random layers are among `variables`, but not among `weights`.
    paths = [
        {variable.path: variable for variable in variables}
        for variables in (model.weights, model.variables)
        if len({variable.path for variable in variables}) == len(variables)
    ]
    wanted = set(names)
    return next((kind for kind in (ours, *paths, numbered) if set(kind) == wanted), ours)


def named_variables(model: keras.Model) -> Iterator[tuple[str, Any, keras.Layer]]:
    """Yield the name in `get_arrays`, the variable and the layer of each of a model's arrays."""
    yield from _walk(model, "", set())


def roles(model: keras.Model) -> dict[str, Role]:
    """Return the role of every array of a model, by layer type, never by name.

    Trained variables are ``trainable``. Moving means and variances of
    ``keras.layers.BatchNormalization`` have the roles of these names. Integers are ``counter``.
    Spectral norm's vectors are ``unit``. Frozen variables and all others are ``buffer``.

    Examples
    --------
    The names are those of `get_arrays`::

        strategy = CoLearn(5, ..., roles=roles(model))
    """
    trained = {id(variable) for variable in model.trainable_variables}
    found = {}
    for name, variable, layer in named_variables(model):
        if isinstance(layer, keras.layers.BatchNormalization) and variable is layer.moving_mean:
            found[name] = Role.MEAN
        elif isinstance(layer, keras.layers.BatchNormalization) and (
            variable is layer.moving_variance
        ):
            found[name] = Role.VARIANCE
        elif isinstance(layer, keras.layers.SpectralNormalization) and (variable is layer.vector_u):
            found[name] = Role.UNIT
        elif id(variable) in trained:
            found[name] = Role.TRAINABLE
        else:
            is_float = tf.as_dtype(variable.dtype).is_floating
            found[name] = Role.BUFFER if is_float else Role.COUNTER
    return found


def _walk(
    layer: keras.Layer, prefix: str, seen: set[int]
) -> Iterator[tuple[str, Any, keras.Layer]]:
    # A layer's `weights` include its children's, which are named after the child; `seen` has those
    # of layers that occur twice in a model.
    children = layer._flatten_layers(include_self=False, recursive=False)
    of_children = {id(variable) for child in children for variable in child.weights}
    taken: set[str] = set()
    for variable in layer.weights:
        if id(variable) not in of_children | seen:
            seen.add(id(variable))
            # Keras numbers unnamed variables through the whole process, as it does with layers.
            name = re.sub(r"^variable_\d+$", "variable", variable.name)
            yield prefix + _unique(name, taken), variable, layer
    for child in children:
        # A layer that a normalization scheme converted keeps the name of its original type, so that
        # converted and plain models exchange arrays.
        kind = getattr(child, "converted_from", type(child)).__name__
        label = _unique(_snake_case(kind), taken)
        yield from _walk(child, f"{prefix}{label}/", seen)


def _unique(name: str, taken: set[str]) -> str:
    """Return `name`, or `name` with the first number that is not taken, and add it to `taken`."""
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def _snake_case(name: str) -> str:
    """Return a class name in Keras's snake case: ``Conv2D`` is conv2d, ``LSTMCell`` lstm_cell."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
