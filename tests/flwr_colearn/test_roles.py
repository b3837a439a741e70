import numpy as np
import pytest

from flwr_colearn import ColearnError, Role
from flwr_colearn.roles import assign_roles, pair_statistics

TORCH = {
    "conv.weight": Role.TRAINABLE,
    "downsample.1.weight": Role.TRAINABLE,
    "downsample.1.bias": Role.TRAINABLE,
    "downsample.1.running_mean": Role.MEAN,
    "downsample.1.running_var": Role.VARIANCE,
    "downsample.1.num_batches_tracked": Role.COUNTER,
}
KERAS = {
    "conv2d/kernel": Role.TRAINABLE,
    "batch_normalization/gamma": Role.TRAINABLE,
    "batch_normalization/moving_mean": Role.MEAN,
    "batch_normalization/moving_variance": Role.VARIANCE,
}
SLIM = {
    "net/Conv/weights:0": Role.TRAINABLE,
    "net/Conv/BatchNorm/beta:0": Role.TRAINABLE,
    "net/Conv/BatchNorm/moving_mean:0": Role.MEAN,
    "net/Conv/BatchNorm/moving_variance:0": Role.VARIANCE,
    "global_step:0": Role.COUNTER,
}


def zeros(roles):
    """A model with arrays of the types that belong to the roles."""
    return {
        name: np.zeros(2, np.int64 if role is Role.COUNTER else np.float32)
        for name, role in roles.items()
    }


def nameless(*dtypes):
    return {str(index): np.zeros(2, dtype) for index, dtype in enumerate(dtypes)}


@pytest.mark.parametrize("roles", [TORCH, KERAS, SLIM], ids=["torch", "keras", "tf-slim"])
def test_names_decide_the_roles(roles):
    assert assign_roles(zeros(roles)) == roles


def test_a_lone_batch_norm_layer_has_roles_too():
    roles = {
        "weight": Role.TRAINABLE,
        "running_mean": Role.MEAN,
        "running_var": Role.VARIANCE,
        "num_batches_tracked": Role.COUNTER,
    }
    assert assign_roles(zeros(roles)) == roles
    assert pair_statistics(zeros(roles), roles) == [("running_mean", "running_var")]


@pytest.mark.parametrize("name", ["running_mean_head.weight", "bn/moving_mean_x", "my_running_var"])
def test_only_the_whole_last_part_of_a_name_counts(name):
    assert assign_roles({name: np.zeros(2, np.float32)}) == {name: Role.TRAINABLE}


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
def test_integers_and_booleans_are_counters_whatever_their_name(dtype):
    assert assign_roles({"weight": np.zeros(2, dtype)}) == {"weight": Role.COUNTER}


def test_nameless_arrays_get_roles_by_type_and_one_warning(flower_log):
    assert assign_roles(nameless("f4", "i8")) == {"0": Role.TRAINABLE, "1": Role.COUNTER}
    warnings = [record for record in flower_log.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "have no names" in warnings[0].getMessage()


def test_named_arrays_bring_no_warning(flower_log):
    assign_roles(zeros(TORCH))
    assert not flower_log.records


def test_a_list_gives_every_nameless_array_its_role_without_a_warning(flower_log):
    roles = assign_roles(nameless("f4", "f4", "f4"), ["trainable", "mean", Role.VARIANCE])
    assert list(roles.values()) == [Role.TRAINABLE, Role.MEAN, Role.VARIANCE]
    assert not flower_log.records


def test_a_mapping_changes_only_the_roles_it_names():
    changed = {"conv.weight": "mean", "downsample.1.running_mean": Role.TRAINABLE}
    roles = assign_roles(zeros(TORCH), changed)
    assert roles == {**TORCH, "conv.weight": Role.MEAN, "downsample.1.running_mean": "trainable"}


@pytest.mark.parametrize(
    ("given_roles", "message"),
    [
        ({"conv.wieght": "mean"}, r"names of the model's arrays \['conv.weight'.*found 'conv.wie"),
        ({"conv.weight": "momentum"}, "one of trainable, mean, variance, counter.*'momentum'"),
        ({"conv.weight": "counter"}, "'conv.weight' with role 'counter': expected an integer type"),
        ({"downsample.1.num_batches_tracked": "mean"}, "expected a float type, found 'int64'"),
        (["trainable"] * 5, "one role for each of the 6 arrays"),
        ("trainable", "one role for each of the 6 arrays"),
        (["trainable"] * 6, "num_batches_tracked' with role 'trainable': expected a float type"),
    ],
)
def test_contradictions_are_refused(given_roles, message):
    with pytest.raises(ColearnError, match=message):
        assign_roles(zeros(TORCH), given_roles)


@pytest.mark.parametrize("array", [np.zeros(2, complex), np.array(["a"]), np.array([None])])
def test_arrays_that_cannot_be_averaged_are_refused(array):
    with pytest.raises(ColearnError, match="expected a float, integer or boolean type"):
        assign_roles({"w": array})


@pytest.mark.parametrize("roles", [TORCH, KERAS, SLIM], ids=["torch", "keras", "tf-slim"])
def test_mean_and_variance_of_a_layer_belong_together(roles):
    [(mean, variance)] = pair_statistics(zeros(roles), roles)
    assert (roles[mean], roles[variance]) == (Role.MEAN, Role.VARIANCE)


def test_statistics_pair_within_their_layer_only():
    roles = {
        "a.running_mean": Role.MEAN,
        "b.running_var": Role.VARIANCE,
        "c.running_var": Role.VARIANCE,
        "c.running_mean": Role.MEAN,
    }
    assert pair_statistics(zeros(roles), roles) == [("c.running_mean", "c.running_var")]


def test_nameless_statistics_pair_in_order():
    arrays = nameless(*["f4"] * 5)
    roles = assign_roles(arrays, ["mean", "mean", "trainable", "variance", "variance"])
    assert pair_statistics(arrays, roles) == [("0", "3"), ("1", "4")]


def test_a_pair_of_different_shapes_is_refused():
    arrays = {"bn.running_mean": np.zeros(2), "bn.running_var": np.zeros(3)}
    with pytest.raises(ColearnError, match=r"of one shape, found \(2,\) and \(3,\)"):
        pair_statistics(arrays, assign_roles(arrays))
