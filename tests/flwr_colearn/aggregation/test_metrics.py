"""Metrics that participants lack, or have as NaN: the mean is that of the others."""

import math

import pytest
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from flwr_colearn.aggregation import aggregated, average_metrics
from flwr_colearn.history import plain_means

KEY = "num-examples"


def contents(*sites):
    return [RecordDict({"metrics": MetricRecord(site)}) for site in sites]


def test_a_metric_is_averaged_over_the_participants_that_have_it():
    sites = contents({KEY: 1, "auc": 0.9}, {KEY: 3, "auc": 0.5}, {KEY: 4, "f1": 1.0})
    # (1 * 0.9 + 3 * 0.5) / 4, and f1 of the third alone
    assert dict(average_metrics(sites, KEY)) == pytest.approx({"auc": 0.6, "f1": 1.0})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_left_out(bad):
    sites = contents({KEY: 1, "loss": 2.0}, {KEY: 1, "loss": bad}, {KEY: 1, "loss": 4.0})
    assert average_metrics(sites, KEY)["loss"] == 3.0
    assert plain_means([{"loss": 2.0}, {"loss": bad}, {}, {"loss": 4.0}]) == {"loss": 3.0}


def test_a_metric_that_nobody_has_as_a_number_is_nan():
    assert math.isnan(average_metrics(contents({KEY: 1, "loss": math.nan}), KEY)["loss"])


def test_the_elements_of_lists_are_averaged_one_by_one():
    sites = contents({KEY: 1, "recall": [0.0, math.nan]}, {KEY: 3, "recall": [1.0, 0.5]})
    assert average_metrics(sites, KEY)["recall"] == [0.75, 0.5]


def test_values_of_several_forms_cost_only_their_own_metric(flower_log):
    sites = contents({KEY: 1, "loss": [1.0], "auc": 0.5}, {KEY: 1, "loss": 1.0, "auc": 1.0})
    assert dict(average_metrics(sites, KEY)) == {"auc": 0.75}
    assert "metric 'loss' has no mean" in flower_log.text


def test_complete_metrics_have_the_bits_of_flowers_own_mean():
    sites = contents(*({KEY: k + 3, "a": 0.1 * k, "b": [0.7 * k, 1 / (k + 1)]} for k in range(5)))
    assert dict(average_metrics(sites, KEY)) == dict(aggregate_metricrecords(sites, KEY))


def test_the_log_names_the_participants_that_lack_a_metric(flower_log):
    sites = contents({KEY: 1, "auc": 0.9}, {KEY: 1}, {KEY: 1, "auc": math.nan})
    aggregated(average_metrics, list(zip("abc", sites, strict=True)), KEY)
    assert "metric 'auc': expected a finite number from each of 3 participants" in flower_log.text
    assert "found none from b, c;" in flower_log.text
    assert "num-examples" not in flower_log.text
