"""The page on own strategies: every example runs as printed, and does what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from flwr_colearn import (
    CoLearn,
    ColearnError,
    Compression,
    Float16,
    Guard,
    History,
    InProcessGrid,
    Int8,
    LocalStatistics,
    Recovery,
    Transport,
)
from tests.dropin.shapes import INITIAL, app_of, record_of, run_legacy

PAGE = Path(__file__).parents[2] / "docs" / "own-strategy.md"
RULES = {"local_epochs": 1, "learning_rate": 0.1}
CONFIG = {"local-epochs": 1, "learning-rate": 0.1}


def examples():
    """Return the examples of the page by heading."""
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    return {
        heading: blocks
        for heading, text in sections
        if (blocks := re.findall(r"```python\n(.*?)```", text, re.S))
    }


EXAMPLES = examples()


def flaky(app, k):
    """Return a grid on which participant 1 fails once in every round."""
    grid, failed = InProcessGrid(app, k), set()

    def client_app(message, context):
        number = message.content.get("config", {}).get("server-round")
        training = message.metadata.message_type == "train" and "arrays" in message.content
        if training and context.node_id == 2 and number not in failed:
            failed.add(number)
            raise OSError("the disk is busy")
        return app(message, context)

    grid.client_app = client_app
    return grid


def run_example(block, steps=(1, 1, 1), grid=None, **more):
    """Run a block of the page; return its names."""
    names = {
        "__name__": "own_strategy",
        "grid": grid or InProcessGrid(app_of(steps), len(steps)),
        "initial_arrays": record_of(INITIAL),
        "train_config": ConfigRecord(CONFIG),
        "evaluate_fn": lambda number, arrays: MetricRecord({"accuracy": 1.0 / number}),
        **more,
    }
    exec(compile(block, PAGE, "exec"), names)
    return names


def first_number(arrays):
    return float(arrays["fc.weight"].numpy()[0, 0])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_page_has_the_shapes():
    assert {heading: len(blocks) for heading, blocks in EXAMPLES.items()} == {
        "A subclass of FedAvg": 1,
        "FedProx": 2,
        "FedAdam": 1,
        "Its own start": 1,
        "Its own aggregation": 1,
        "The legacy API": 1,
    }


def test_a_subclass_of_fedavg():
    names = run_example(EXAMPLES["A subclass of FedAvg"][0], steps=(1, 1, 100))
    assert first_number(names["result"].arrays) == 2.0


@pytest.mark.parametrize("number", [0, 1])
def test_fedprox(number):
    seen = []
    app = app_of((1, 1, 1))

    def watched(message, context):
        if "config" in message.content:
            seen.append(message.content["config"].get("proximal-mu"))
        return app(message, context)

    grid = InProcessGrid(app, 3)
    grid.client_app = watched
    names = run_example(EXAMPLES["FedProx"][number], grid=grid)
    assert seen == [0.1] * 6
    assert first_number(names["result"].arrays) == [2.0, 4.0][number]


def test_fedadam_with_compression_checkpoints_and_history():
    names = run_example(EXAMPLES["FedAdam"][0])
    records = History.read("history.jsonl").records
    assert len(records) == 2
    assert records[0].bytes_up is not None
    assert Path("checkpoints").is_dir()
    # FedAdam's first step is about eta in the direction of the update.
    assert 0.005 < first_number(names["result"].arrays) < 0.05


def test_its_own_start_has_restarts_through_the_connected_grid(flower_log):
    block = EXAMPLES["Its own start"][0]
    restarting = block.replace("Transport()", "Transport(Recovery(pause=0.0))")
    restarting = restarting.replace("import Transport", "import Recovery, Transport")
    grid = flaky(app_of((1, 1, 4)), 3)
    names = run_example(restarting, grid=grid)
    assert first_number(names["result"].arrays) == 4.0
    assert flower_log.text.count("restart of participant partition-1") == 2
    assert names["strategy"].best == 1.0
    assert first_number(names["strategy"].best_arrays) == 2.0
    assert first_number(run_example(block)["result"].arrays) == 2.0


def test_its_own_aggregation():
    names = run_example(EXAMPLES["Its own aggregation"][0], steps=(1, 2, 100))
    assert first_number(names["result"].arrays) == 8.0
    assert names["strategy"].history.records[1].relative_change == pytest.approx(1.0)


def test_the_legacy_api():
    names = run_example(EXAMPLES["The legacy API"][0])
    strategy, shared = names["strategy"], []
    strategy.evaluate_fn = lambda number, arrays, config: shared.append(arrays)
    called = run_legacy(strategy, [1, 1, 100])
    assert sorted(called) == [0, 1, 2]
    np.testing.assert_array_equal(shared[-1][0], np.ones((2, 2)))


# A subclass of CoLearn with its own start


class OwnStart(CoLearn):
    """A loop of the project's own; `connects` says how it uses the grid."""

    def __init__(self, *args, connects=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.connects = connects

    def start(self, grid, arrays, num_rounds, timeout=3600.0):
        if self.connects:
            grid = self.transport.connect(grid)
        for number in range(1, num_rounds + 1):
            sent = self.configure_train(number, arrays, ConfigRecord(), grid)
            average, _ = self.aggregate_train(number, grid.send_and_receive(sent, timeout=timeout))
            arrays = arrays if average is None else average
            sent = self.configure_evaluate(number, arrays, ConfigRecord(), grid)
            self.aggregate_evaluate(number, grid.send_and_receive(sent, timeout=timeout))
        return arrays


FEATURES = [
    {"recovery": Recovery(pause=0.0)},
    {"compression": Compression(up=Int8(), down=Float16())},
    {"normalization": LocalStatistics()},
    {"guard": None},
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_a_subclass_of_colearn_with_its_own_start_connects_its_own_features(features, flower_log):
    features = {"recovery": Recovery(pause=0.0), **features}
    strategy = OwnStart(3, **RULES, **features)
    arrays = strategy.start(flaky(app_of((1, 1, 4)), 3), record_of(INITIAL), 2)
    assert first_number(arrays) == pytest.approx(4.0, abs=0.05)
    assert [len(record.participants) for record in strategy.history] == [3, 3]
    assert [len(record.restarts) for record in strategy.history] == [1, 1]
    assert "privacy" not in flower_log.text
    assert "no restarts" not in flower_log.text


def test_its_guard_restarts_the_sender_too(flower_log):
    guard = Guard(first=1.0)
    strategy = OwnStart(2, guard=guard, recovery=Recovery(pause=0.0), **RULES)
    with pytest.raises(ColearnError, match="norm of the update"):
        strategy.start(InProcessGrid(app_of((1, 1e6)), 2), record_of(INITIAL), 1)
    assert "restart of participant partition-1" in flower_log.text


def test_without_a_connected_grid_the_log_says_how_to_have_restarts(flower_log):
    strategy = OwnStart(2, connects=False, **RULES)
    strategy.start(InProcessGrid(app_of((1, 1)), 2), record_of(INITIAL), 2)
    assert flower_log.text.count("grid = strategy.transport.connect(grid)") == 1
    assert "privacy" not in flower_log.text


@pytest.mark.parametrize(
    "features",
    [
        {"total_epochs": 4},
        {"checkpoints": "here"},
        {"participants": ["a", "b"]},
        {"compression": Compression(up=Float16())},
        {"normalization": LocalStatistics()},
    ],
    ids=str,
)
def test_what_its_own_loop_cannot_have_is_refused_without_a_word_of_privacy(features):
    strategy = OwnStart(2, connects=False, **RULES, **features)
    with pytest.raises(ColearnError, match=r"outside flwr_colearn.run \(in a `start`") as raised:
        strategy.start(InProcessGrid(app_of((1, 1)), 2), record_of(INITIAL), 1)
    assert "privacy" not in str(raised.value)
    assert "connect(grid)" in str(raised.value) or "flwr_colearn.run(" in str(raised.value)


def test_under_a_privacy_wrapper_the_text_still_speaks_of_privacy():
    strategy = CoLearn(2, total_epochs=4, **RULES)
    wrapper = DifferentialPrivacyServerSideFixedClipping(strategy, 1.0, 1.0, 2)
    with pytest.raises(ColearnError, match="under a wrapper such as differential privacy"):
        wrapper.start(InProcessGrid(app_of((1, 1)), 2), record_of(INITIAL))


def test_a_connected_grid_may_have_features_that_privacy_forbids_where_there_is_none():
    transport = Transport(compression=Compression(up=Int8()))
    strategy = OwnStart(2, connects=False, **RULES)
    grid = transport.connect(InProcessGrid(app_of((1, 1)), 2))
    assert first_number(strategy.start(grid, record_of(INITIAL), 1)) == pytest.approx(1.0, abs=0.01)
