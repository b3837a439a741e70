"""More sites than participants, fewer, and a project that is debugged in this process."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    Averaging,
    CoLearn,
    ColearnError,
    DynamicAveraging,
    InProcessGrid,
    Recovery,
    ThreadedGrid,
    legacy,
    participant_mod,
    run,
)
from flwr_colearn.recovery import choose_members, wait_for_nodes
from tests.dropin.shapes import INITIAL, answer, app_of, filled, record_of, run_legacy
from tests.faults import MODEL, FaultyGrid

ROOT = Path(__file__).parents[2]
RULES = {"local_epochs": 1, "learning_rate": 0.1}


def sites_by_round(strategy):
    return [[int(name.rpartition("-")[2]) for name in r.participants] for r in strategy.history]


def start(strategy, sites, rounds, evaluates=False):
    grid = InProcessGrid(app_of([1] * sites, evaluates=evaluates), sites)
    strategy.start(grid, record_of(INITIAL), num_rounds=rounds)
    return strategy


# More sites than participants


def test_the_server_says_that_only_some_of_the_sites_train(flower_log):
    strategy = start(CoLearn(5, fraction_evaluate=0.0, **RULES), 10, 3)
    assert len({tuple(sites) for sites in sites_by_round(strategy)}) == 1
    lines = [r.getMessage() for r in flower_log.records if "connected sites" in r.getMessage()]
    assert lines == [
        "CoLearn: 5 of 10 connected sites train, the same in every round; num_participants=10 "
        "trains all, rotate=True lets them take turns"
    ]


def test_without_a_number_the_server_says_that_two_train(flower_log):
    start(CoLearn(fraction_evaluate=0.0, **RULES), 4, 1)
    assert "CoLearn: 2 of 4 connected sites train" in flower_log.text


def test_with_all_sites_there_is_nothing_to_say(flower_log):
    start(CoLearn(4, fraction_evaluate=0.0, **RULES), 4, 1)
    assert "connected sites" not in flower_log.text


def test_the_legacy_api_says_it_too(flower_log):
    run_legacy(legacy.CoLearn(2, fraction_evaluate=0.0, **RULES), [1] * 4, num_rounds=3)
    assert flower_log.text.count("2 of 4 connected sites train") == 1


@pytest.mark.parametrize(("k", "sites"), [(5, 10), (2, 5), (3, 4), (4, 4)])
def test_with_rotate_the_sites_take_turns(k, sites, flower_log):
    rounds = 2 * sites
    strategy = start(CoLearn(k, rotate=True, fraction_evaluate=0.0, **RULES), sites, rounds)
    by_round = sites_by_round(strategy)
    assert all(len(each) == k for each in by_round)
    # As even as can be, at the end and after every round.
    for number in range(1, rounds + 1):
        turns = Counter(site for each in by_round[:number] for site in each)
        counts = [turns[site] for site in range(sites)]
        assert max(counts) - min(counts) <= 1
    assert ("connected sites train, in turn" in flower_log.text) == (k < sites)


def test_a_site_that_leaves_loses_its_turn_and_one_that_joins_has_the_next():
    class Grid:
        nodes = [1, 2, 3, 4]  # noqa: RUF012

        def get_node_ids(self):
            return self.nodes

    grid, queue = Grid(), []

    def turn():
        nodes = choose_members(grid, 2, queue, random.Random(0), rotate=True).nodes
        queue[:] = [node for node in queue if node not in nodes] + nodes
        return set(nodes)

    assert turn() | turn() == {1, 2, 3, 4}
    grid.nodes = [1, 2, 3, 5]
    assert 5 in turn()
    assert 4 not in turn() | turn()


def test_a_resumed_run_goes_on_with_the_turns(tmp_path):
    def run_for(rounds, folder, resume="never"):
        strategy = CoLearn(
            2, rotate=True, fraction_evaluate=0.0, checkpoints=tmp_path / folder, **RULES
        )
        grid = InProcessGrid(app_of([1] * 5), 5)
        strategy.start(grid, record_of(INITIAL), num_rounds=rounds, resume=resume)
        return sites_by_round(strategy)

    run_for(3, "interrupted")
    by_round = run_for(8, "interrupted", "auto")
    turns = Counter(site for each in by_round for site in each)
    assert max(turns.values()) - min(turns.values()) <= 1


def test_a_part_of_the_sites_evaluates_as_the_app_had_it():
    asked = []

    class Watching(InProcessGrid):
        closed = True

        def send_and_receive(self, messages, *, timeout=None):
            batch = list(messages)
            if batch and batch[0].metadata.message_type == "evaluate":
                asked.append(len(batch))
            return super().send_and_receive(batch, timeout=timeout)

    for fraction in (0.5, 0.2, 1.0):
        strategy = CoLearn(10, fraction_evaluate=fraction, **RULES)
        grid = Watching(app_of([1] * 10), 10)
        strategy.start(grid, record_of(INITIAL), num_rounds=1)
    assert asked == [5, 2, 10]
    assert FedAvg(fraction_evaluate=0.5).min_evaluate_nodes == 2
    assert legacy.CoLearn(10, fraction_evaluate=0.5, **RULES).min_evaluate_clients == 2
    assert CoLearn(10, fraction_evaluate=0.5, min_evaluate_nodes=7, **RULES).min_evaluate_nodes == 7


# Fewer sites than participants


def test_the_server_says_once_how_to_connect_and_then_ever_more_rarely(clock, flower_log):
    grid = FaultyGrid(clock, k=2)
    with pytest.raises(ColearnError, match="num-supernodes=5"):
        wait_for_nodes(grid, 5, 24 * 3600.0)
    lines = [r.getMessage() for r in flower_log.records]
    assert sum('--federation-config "num-supernodes=5' in line for line in lines) == 1
    assert "num-supernodes=5" in lines[1]  # right after the first line
    waits = [line for line in lines if line.startswith("Waiting for participants: 2 of 5")]
    assert 10 < len(waits) < 80  # a line a minute would be 1,440


@pytest.mark.parametrize("kind", [InProcessGrid, ThreadedGrid])
@pytest.mark.parametrize(
    "start",
    [
        lambda grid: CoLearn(5, **RULES).start(grid, record_of(INITIAL)),
        lambda grid: Averaging(5).start(grid, record_of(INITIAL)),
        lambda grid: run(FedAvg(min_available_nodes=5), grid, record_of(INITIAL)),
        lambda grid: DynamicAveraging(0.1, check_every=1, num_learners=5).start(
            grid, record_of(INITIAL), num_rounds=1
        ),
    ],
    ids=["CoLearn", "Averaging", "FedAvg", "DynamicAveraging"],
)
def test_in_this_process_too_few_participants_are_an_error_at_once(start, kind):
    with pytest.raises(ColearnError, match=r"expected 5, found 2 in this process"):
        start(kind(app_of([1, 1]), 2))


# An app that raises, in this process


def raising(mods=(), evaluates=True):
    app, calls = ClientApp(mods=list(mods)), []

    @app.train()
    def train(message, context):
        calls.append(context.node_config["partition-id"])
        arrays = message.content["arrays"]  # the query for the name has none
        return answer(message, {**filled(1), "lr": context.run_config["learning-rate"]}), arrays

    return app, calls


@pytest.mark.parametrize("mods", [[], [participant_mod]], ids=["plain", "mod"])
def test_an_app_that_raises_in_this_process_is_called_once_and_has_one_traceback(mods, flower_log):
    app, _ = raising(mods)
    with pytest.raises(ColearnError, match="KeyError"):
        CoLearn(5, **RULES).start(InProcessGrid(app, 5), record_of(INITIAL))
    assert flower_log.text.count("Traceback (most recent call last)") == 1
    assert "learning-rate" in flower_log.text
    assert "restart" not in flower_log.text.replace("0 restarts", "")
    assert len(flower_log.text.splitlines()) < 80


@pytest.mark.parametrize("recovery", [Recovery(), Recovery(pause=0.0)], ids=str)
def test_a_recovery_that_the_user_gives_restarts_in_this_process_too(recovery, clock):
    failed = []

    def fails_once(message, context):
        if "arrays" in message.content and not failed:
            failed.append(True)
            raise OSError("disk")
        return answer(message, filled(1))

    app = ClientApp()
    app.train()(fails_once)
    strategy = CoLearn(2, recovery=recovery, fraction_evaluate=0.0, **RULES)
    strategy.start(InProcessGrid(app, 2), record_of(INITIAL), num_rounds=1)
    assert len(strategy.history.records[0].restarts) == 1


def test_the_legacy_api_has_no_restarts_in_this_process_by_default():
    def raises(calls):
        raise ValueError("a bug")

    strategy, called = legacy.CoLearn(2, fraction_evaluate=0.0, **RULES), []
    with pytest.raises(ColearnError, match="a bug"):
        run_legacy(strategy, [raises, raises], called=called)
    assert sorted(called) == [0, 1]


def test_elsewhere_the_default_recovery_restarts(clock):
    grid = FaultyGrid(clock, {(1, 0, 0): "raises"}, k=2)
    strategy = CoLearn(2, fraction_evaluate=0.0, **RULES)
    strategy.start(grid, record_of(MODEL), num_rounds=1)
    assert len(strategy.history.records[0].restarts) == 1


def test_an_evaluation_that_raises_everywhere_has_one_traceback(flower_log):
    app = app_of([1] * 4, mod=False, evaluates=False)

    @app.evaluate()
    def evaluate(message, context):
        raise ValueError("no test data")

    strategy = CoLearn(4, **RULES)
    strategy.start(InProcessGrid(app, 4), record_of(INITIAL), num_rounds=2)
    assert flower_log.text.count("Traceback (most recent call last)") == 1
    assert flower_log.text.count("raised ValueError: no test data") == 8


# The documents


def test_the_line_of_the_page_debugs_an_app_that_reads_its_run_config():
    text = (ROOT / "docs" / "drop-in.md").read_text()
    [line] = re.findall(r"`(strategy\.start\(InProcessGrid\(.*?initial_arrays\))`", text)
    seen, app = [], ClientApp()

    @app.train()
    def train(message, context):
        if "arrays" in message.content:
            seen.append(context.run_config["batch-size"])
        return answer(message, filled(1))

    strategy = CoLearn(5, fraction_evaluate=0.0, **RULES)
    names = {"InProcessGrid": InProcessGrid, "client_app": app, "strategy": strategy}
    exec(line, {**names, "initial_arrays": record_of(INITIAL)})
    assert seen == [32] * 15


@pytest.mark.parametrize("page", ["README.md", "docs/drop-in.md"])
def test_both_drop_in_texts_have_the_command_for_five_participants(page):
    text = (ROOT / page).read_text()
    assert '--federation-config "num-supernodes=5"' in text
    assert "rotate=True" in text
