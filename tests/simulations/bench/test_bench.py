"""What the benchmarks' figures mean: tiny runs of each, in process."""

import argparse
import json
import logging
import math
import os

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from clients.settings import ParticipantSettings
from clients.tasks.registry import participant_trainer, server_trainer
from clients.trainer import derive_seed, follow
from flwr_colearn import ColearnError, CyclicalRate, History, InProcessGrid, LocalPlan, RoundRecord
from simulations.bench import __main__ as bench
from simulations.bench import aggregation, communication, overhead, scale, secure
from simulations.bench.app.noop.client_app import app as noop_app
from simulations.bench.app.noop.rounds import (
    STRATEGIES,
    random_model,
    seconds_per_round,
    timed,
)
from simulations.bench.communication import Link, until
from tests.faults import is_query

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

DIGITS = ParticipantSettings(examples=150, devices="cpu")


@pytest.fixture(autouse=True, scope="module")
def _log_level():
    """``main`` quietens Flower's log for good."""
    before = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.ERROR)
    yield
    logging.getLogger("flwr").setLevel(before)


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def options_of(module, arguments):
    """The options of a benchmark, as its command line gives them."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(arguments.split())


# overhead


def jittered(inputs, training):
    """An augmentation that draws from PyTorch's global generator, as CIFAR-10's does."""
    return inputs + 0.1 * torch.rand(len(inputs), 1, 1, 1) if training else inputs


def with_jitter(settings):
    trainer = participant_trainer(settings, 1, 5)
    trainer.transform = jittered
    trainer.set_weights(server_trainer(settings).get_weights())
    return trainer


def test_the_bare_loop_gives_the_bits_of_the_participants_training():
    settings = ParticipantSettings(examples=500, weight_decay=1e-3, devices="cpu")
    plan = LocalPlan.of(CyclicalRate(0.05, 0.25), 2, 2, 2)
    product, bare = with_jitter(settings), with_jitter(settings)
    follow(plan, product, derive_seed(0, 1))
    overhead.bare_loop(bare, settings, plan, derive_seed(0, 1))
    expected = product.get_weights()
    for name, array in bare.get_weights().items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_the_bare_loop_and_the_run_do_the_same_steps(monkeypatch):
    steps = []
    step = torch.optim.SGD.step

    def counted(self, *args, **kwargs):
        steps.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    overhead.bare(DIGITS, 2, 2)()
    bare, steps = steps, []
    overhead.colearn(DIGITS, 2, 2)()
    assert bare == steps
    # 5 participants of 30 examples, one batch each; twice two epochs at the rates of eq. 3.
    assert steps == [
        CyclicalRate(0.05).at(j, 2) for _ in range(2) for _ in range(5) for j in (1, 2)
    ]


def test_overhead_in_process():
    options = options_of(
        overhead,
        "--parts training process --task digits --examples 150 --repeats 2 --mebibytes 0.01",
    )
    rows = overhead.run(options)["rows"]
    assert [row["what"] for row in rows] == [
        "digits, wall",
        "digits, CPU",
        "round of no-ops, 0.01 MiB, process",
    ]
    assert [row["pairs"] for row in rows] == [2, 2, 2 * overhead.ROUNDS_IN_PROCESS]
    for row in rows:
        assert row["lowest"] <= row["ratio"] <= row["highest"]


def test_a_row_has_the_median_of_the_paired_ratios():
    row = overhead.row("x", [1.0, 2.0, 10.0], [2.0, 3.0, 11.0])
    assert (row["yardstick s"], row["co-learning s"]) == (2.0, 3.0)
    assert (row["ratio"], row["lowest"], row["highest"]) == (1.5, 1.1, 2.0)


def test_an_app_that_does_not_reach_its_end_is_an_error_with_its_log(tmp_path):
    with pytest.raises(ColearnError, match="no such luck"):
        overhead.read(tmp_path / "seconds.json", "no such luck")


# Rounds of no-ops


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_ops_leave_the_model_as_it_is(name):
    model = random_model(0.01)
    result = STRATEGIES[name](3).start(InProcessGrid(noop_app, 3), model, num_rounds=2)
    for key, array in model.items():
        # FedAvg adds up thirds.
        np.testing.assert_allclose(result.arrays[key].numpy(), array.numpy(), rtol=1e-6)


def test_a_model_has_the_size_asked_for():
    assert sum(array.numpy().nbytes for array in random_model(0.5).values()) == pytest.approx(
        2**19, abs=40
    )


def test_every_counted_round_of_both_strategies_has_its_seconds(monkeypatch):
    calls = []

    class Recorded(InProcessGrid):
        def push_messages(self, messages):
            messages = list(messages)
            # The query for the names, before the first round, belongs to no round.
            if not any(map(is_query, messages)):
                calls.append(len(messages))
            return super().push_messages(messages)

    seconds = seconds_per_round(Recorded(noop_app, 3), 3, random_model(0.01), rounds=2, repeats=2)
    assert {name: len(values) for name, values in seconds.items()} == {"FedAvg": 4, "CoLearn": 4}
    assert all(value > 0 for values in seconds.values() for value in values)
    # Each turn has one round more than is counted, of three participants.
    assert calls.count(3) == 2 * 2 * (1 + 2)


def test_the_first_round_is_not_counted(monkeypatch):
    class Rounds(FedAvg):
        def start(self, grid, initial_arrays, num_rounds, evaluate_fn):
            for server_round, now in enumerate([0.0, 100.0, 101.0, 103.0][: num_rounds + 1]):
                monkeypatch.setattr("time.perf_counter", lambda now=now: now)
                evaluate_fn(server_round, initial_arrays)

    assert timed(Rounds(), None, ArrayRecord(), 2) == [1.0, 2.0]


# communication


def history_of(*rounds):
    """A history of two participants: (T, bytes down, bytes up, accuracy) of every round."""
    history, done = History(), 0
    for number, (epochs, down, up, accuracy) in enumerate(rounds, 1):
        done += epochs
        history.records.append(
            RoundRecord(
                number,
                epochs,
                0.01,
                done,
                bytes_down=down,
                bytes_up=up,
                participants=["a", "b"],
                server_metrics={"accuracy": accuracy},
            )
        )
    return history


def test_the_target_is_met_in_the_first_round_that_reaches_it():
    link = Link(down=8.0, up=4.0, latency=250.0)
    history = history_of(
        (1, 2_000_000, 1_000_000, 0.4), (3, 2_000_000, 1_000_000, 0.6), (1, 9, 9, 0.5)
    )
    # 4 epochs of 7 s; a round is 1 MB at 8 Mbit/s, half a MB at 4 Mbit/s, twice a quarter second.
    hours = (4 * 7 + 2 * (1 + 1 + 0.5)) / 3600
    expected = {"rounds": 2, "epochs": 4, "MB": 6.0, "hours": hours}
    assert until(history, 0.6, link, 7.0) == pytest.approx(expected)
    assert set(until(history, 0.61, link, 7.0).values()) == {math.inf}


def test_table_1_on_paper():
    row = communication.on_paper(Link(down=100.0, up=100.0, latency=0.0))[1]
    assert row["model (paper)"] == "ResNet-152"
    transfer = 2 * 223 * 2**20 * 8 / 100e6 / 60  # minutes of one round
    assert row["transfer min a round"] == pytest.approx(transfer, abs=0.01)
    assert row["hours, T=T0"] == pytest.approx((20 * 30 + 20 * transfer) / 60, abs=0.01)
    assert row["hours, T=1"] == pytest.approx((20 * 30 + 100 * transfer) / 60, abs=0.01)
    assert row["% transfer, T=4*T0"] == pytest.approx(100 * transfer / (120 + transfer), abs=0.1)


def test_communication_on_a_few_digits():
    options = options_of(
        communication,
        "--tasks digits --examples 150 --total-epochs 3 --initial-epochs 2 --seeds 1 "
        "--targets 0.0 2.0 --epoch-seconds 36 --latency 0 --down 1e9 --up 1e9",
    )
    result = communication.run(options)
    runs = {row["way"]: row for row in result["runs"]}
    weights = server_trainer(ParticipantSettings()).get_weights().values()
    # Both ways and five participants; Flower's arrays have a header of 128 bytes each.
    model = sum(array.nbytes + 128 for array in weights)
    assert runs["FedAvg, T=1"]["MB in all"] == pytest.approx(3 * 10 * model / 1e6, abs=1e-3)
    assert runs["co-learning"]["MB in all"] == pytest.approx(2 * 10 * model / 1e6, abs=1e-3)
    assert runs["CLR, T=4*T0"]["rounds x T, seed 0"] == "1x3"
    assert runs["co-learning"]["rounds x T, seed 0"] == "1x2 1x1"
    down = runs["co-learning"]["MB in all"] / 2
    assert down < runs["co-learning, int8"]["MB in all"] < 1.4 * down
    first, last = result["rows"][:6], result["rows"][6:]
    assert {row["rounds"] for row in first} == {1}
    assert [row["hours"] for row in first] == pytest.approx([0.01, 0.02, 0.02, 0.03, 0.02, 0.02])
    assert {row["MB"] for row in last} == {"not reached"}
    assert {row["seeds"] for row in last} == {"0/1"}


# scale


def test_the_line_through_a_line_is_that_line():
    assert scale.line([1, 2, 5], [5.0, 7.0, 13.0]) == {
        "slope": 2.0,
        "intercept": 3.0,
        "R^2": 1.0,
        "rise": 2.6,
    }
    assert scale.line([1, 2, 3], [4.0, 4.0, 4.0])["R^2"] == 1.0


def test_r_squared_of_points_off_the_line():
    x, y = [0, 1, 2, 3], [1.0, 2.0, 2.0, 4.0]
    assert scale.line(x, y)["R^2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-4)


def test_scale_sees_who_holds_all_replies():
    options = options_of(scale, "--participants 3 6 --mebibytes 1 --sizes 8 16 --k 3 --rounds 1")
    result = scale.run(options)
    by_k = {line["what"]: line for line in result["lines"] if line["over"] == "participants"}
    by_size = {line["what"]: line for line in result["lines"] if line["over"] == "model MiB"}
    assert by_k["FedAvg MiB"]["slope"] >= 1.0  # a reply each
    assert by_k["CoLearn MiB"]["rise"] < 1.1
    assert by_size["CoLearn MiB"]["rise"] == pytest.approx(2.0, abs=0.1)
    assert {row["participants"] for row in result["rows"]} == {3, 6}


# The command


def test_the_command_prints_every_table_and_writes_the_result(tmp_path, capsys, monkeypatch):
    result = {"rows": [{"K": 5}], "lines": [{"R^2": 0.75}], "threads": 3}
    monkeypatch.setattr(scale, "run", lambda options: {**result, "repeats": options.rounds})
    bench.main(["scale", "--rounds", "7", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "scale.json").read_text())
    assert written.pop("benchmark") == "scale"
    assert written.pop("machine")["cores"] == os.cpu_count()
    assert written.pop("versions")["numpy"] == np.__version__
    assert written == {**result, "repeats": 7}
    printed = capsys.readouterr().out
    for part in ("|   K |", "|   R^2 |", "0.75", "threads: 3, repeats: 7", "scale.json"):
        assert part in printed


def test_aggregation_is_timed_at_hand_and_one_by_one():
    models = [random_model(0.01) for _ in range(3)]
    seconds = aggregation.time_rounds(3, models[0], models)
    assert list(seconds) == ["FedAvg", "CoLearn", "one by one"]
    assert {len(each) for each in seconds.values()} == {aggregation.REPEATS}


@pytest.mark.parametrize("k", [3, 6])
def test_memory_of_the_aggregation_is_that_of_three_models_whatever_k(k):
    assert aggregation.peak_memory("CoLearn", k) < 3.2
    assert aggregation.peak_memory("FedAvg", k) > k + 1


# secure


def test_masks_and_bytes_of_secure_aggregation(monkeypatch):
    monkeypatch.setattr(secure, "REPEATS", 1)
    [row] = secure.run(options_of(secure, "--participants 3 --mebibytes 1"))["rows"]
    assert row["participants"] == 3
    assert row["ratio"] > 0
    assert 1.0 <= row["bytes up, ratio"] < 1.1
    # Keys, shares and commitments of three participants, and the names of 16 arrays: a few KB.
    assert 1_000 < row["small stages, bytes"] < 20_000


def test_the_benchmark_s_model_has_the_size_that_it_says():
    for mebibytes in (1, 3):
        model = secure.model_of(mebibytes)
        assert sum(array.nbytes for array in model.values()) == mebibytes * 2**20
