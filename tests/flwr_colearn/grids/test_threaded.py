import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from flwr_colearn import CoLearn, ColearnError, InProcessGrid, Recovery, ThreadedGrid
from flwr_colearn.grids import AllReduceGroup, group_of

K = 3


def work_together(work, parties=K):
    group, results = AllReduceGroup(parties), {}

    def run(rank):
        try:
            results[rank] = work(group, rank)
        except ColearnError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    return group, results


def test_everyone_gets_every_sum():
    def work(group, rank):
        return [group.sum(rank, np.array([rank, call])).tolist() for call in range(50)]

    group, results = work_together(work)
    assert results == {rank: [[3, 3 * call] for call in range(50)] for rank in range(K)}
    assert group.bytes == 50 * 2 * K * 16


def test_sums_are_added_in_order_of_rank():
    values = [1e16, 1.0, -1e16]
    _, results = work_together(lambda group, rank: float(group.sum(rank, np.array(values[rank]))))
    assert set(results.values()) == {(1e16 + 1.0) - 1e16}


def test_nobody_waits_for_one_that_left():
    def work(group, rank):
        if rank == 1:
            group.leave()
            return None
        return group.sum(rank, np.zeros(1))

    _, results = work_together(work)
    assert "one has left" in str(results[0])
    assert "one has left" in str(results[2])


def test_a_group_that_does_not_exist():
    for config in ({}, {"all-reduce-group": 12345, "all-reduce-rank": 0}):
        with pytest.raises(ColearnError, match="in threads of one process"):
            group_of(config)


def summing(broken=()):
    app = ClientApp()

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        if k in broken:
            raise RuntimeError("boom")
        group, rank = group_of(message.content["config"])
        total = group.sum(rank, np.array([k + 1.0]))
        content = {
            "arrays": ArrayRecord({"w": Array(total)}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return FlowerMessage(RecordDict(content), reply_to=message)

    return app


def run(grid):
    strategy = CoLearn(
        K,
        local_epochs=1,
        learning_rate=0.1,
        fraction_evaluate=0.0,
        recovery=Recovery(max_restarts=0),
    )
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(1))}), num_rounds=2)
    return result.arrays["w"].numpy()


def test_participants_of_a_grid_form_a_group():
    grid = ThreadedGrid(summing(), K)
    assert run(grid) == [6.0]
    assert grid.exchanged == 2 * 2 * K * 8


def test_if_one_fails_all_fail_and_nobody_hangs():
    with pytest.raises(ColearnError, match=r"boom|one has left"):
        run(ThreadedGrid(summing(broken={1}), K))


def test_one_after_the_other_there_is_no_group():
    with pytest.raises(ColearnError, match="in threads of one process"):
        run(InProcessGrid(summing(), K))
