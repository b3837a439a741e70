import numpy as np
import pytest

from flwr_colearn import ColearnError
from flwr_colearn.aggregation import check_initial, check_weights

OWN = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, r"1 arrays missing \['a'\], 0 unknown"),
        ({"c": np.zeros(1)}, r"0 arrays missing \[\], 1 unknown \['c'\]"),
        ({"a": np.zeros((3, 2), np.float32)}, r"'a' float32 \(3, 2\) in place of float32 \(2, 3\)"),
        ({"b": np.zeros(4, np.float32)}, r"'b' float32 \(4,\) in place of int64 \(4,\)"),
    ],
)
def test_weights_of_another_model_are_refused_with_what_differs(change, message):
    given = {name: array for name, array in {**OWN, **change}.items() if array is not None}
    with pytest.raises(ColearnError, match=f"expected those of this participant's net.*{message}"):
        check_weights(given, OWN, "net")


def test_weights_of_the_same_model_are_accepted_in_any_order():
    check_weights(dict(reversed(OWN.items())), OWN, "net")


def test_a_nan_anywhere_in_an_initial_model_is_found_and_counted():
    large = np.zeros((3, 100_000), np.float32)  # more than one chunk
    large[2, -1] = large[0, 5] = np.nan
    with pytest.raises(ColearnError, match=r"array 'w': expected no NaN.*found 2"):
        check_initial({"n": np.zeros(4, np.int64), "b": np.ones(2), "w": large})


def test_other_initial_models_are_accepted():
    check_initial({})
    check_initial({"mask": np.array([0, -np.inf], np.float16), "n": np.array(3), "e": np.ones(0)})
