"""Features for any strategy: every cell of the table in docs/features.md, with a torch client."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    QFedAvg,
)

from flwr_colearn import (
    Average,
    Averaging,
    CoLearn,
    ColearnError,
    Compression,
    Float16,
    History,
    InProcessGrid,
    Int8,
    LocalStatistics,
    Recovery,
    RunningMean,
    Transport,
    participant_mod,
    run,
)
from flwr_colearn._flwr import copied, set_message_id
from flwr_colearn.records import cast_record, data_bytes, types_of, view
from flwr_colearn.roles import UNTRAINED, assign_roles
from tests.faults import is_query

torch = pytest.importorskip("torch")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "features.md"
K, ROUNDS = 4, 3
QUICK = Recovery(pause=0.0)


class Clipped(FedAvg):
    """A user's own: updates are clipped in the replies before they are averaged."""

    def configure_train(self, server_round, arrays, config, grid):
        self.shared = view(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        for reply in replies:  # walked before super() is called, as many do
            arrays = reply.content["arrays"]
            for name, array in view(arrays).items():
                if ROLES[name] not in UNTRAINED:
                    moved = np.clip(array - self.shared[name], -0.05, 0.05)
                    arrays[name] = type(arrays[name])(np.asarray(self.shared[name] + moved))
        return super().aggregate_train(server_round, replies)


NODES = {"min_train_nodes": K, "min_available_nodes": K, "fraction_evaluate": 0.0}
GENTLE = {"eta": 0.01, "tau": 0.1, "beta_1": 0.9}
ALL = {"noise_multiplier": 0.0, "num_sampled_clients": K}
STRATEGIES = {
    "`FedAvg`": lambda: FedAvg(**NODES),
    "`FedProx`": lambda: FedProx(proximal_mu=0.1, **NODES),
    "`FedAdam`": lambda: FedAdam(**GENTLE, beta_2=0.99, **NODES),
    "`FedAdagrad`": lambda: FedAdagrad(eta=0.01, tau=0.1, **NODES),
    "`FedYogi`": lambda: FedYogi(**GENTLE, beta_2=0.99, **NODES),
    "`FedAvgM`": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9, **NODES),
    "`FedMedian`": lambda: FedMedian(**NODES),
    "`FedTrimmedAvg`": lambda: FedTrimmedAvg(beta=0.25, **NODES),
    "`Krum`": lambda: Krum(num_malicious_nodes=0, **NODES),
    "`QFedAvg`": lambda: QFedAvg(client_learning_rate=0.1, q=0.1, train_loss_key="loss", **NODES),
    "privacy, fixed clipping": lambda: DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**NODES), clipping_norm=1e3, **ALL
    ),
    "privacy, adaptive clipping": lambda: DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(**NODES), initial_clipping_norm=10.0, clipped_count_stddev=0.0, **ALL
    ),
    "a subclass of your own": lambda: Clipped(**NODES),
    "`Averaging`": lambda: Averaging(K, fraction_evaluate=0.0),
    "`CoLearn`": lambda: CoLearn(K, local_epochs=2, learning_rate=0.1, fraction_evaluate=0.0),
}
PRIVATE = [name for name in STRATEGIES if name.startswith("privacy")]
OURS = ["`Averaging`", "`CoLearn`"]
QFEDAVG = "`QFedAvg`"
BY_ALL_ARRAYS = ["`Krum`", "`FedMedian`", QFEDAVG]  # whose steps depend on statistics too


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )


INITIAL = ArrayRecord(network().state_dict())
ROLES = assign_roles(view(INITIAL))
STATISTICS = [name for name, role in ROLES.items() if role in UNTRAINED]
CONFIG = ConfigRecord({"local-epochs": 2, "learning-rate": 0.1})


def train(k, state, config):
    """Two steps of participant k on its own points, whose scale and place are its own too."""
    net, generator = network(), torch.Generator().manual_seed(k)
    net.load_state_dict(state)
    x = (1 + k) * torch.randn(32, 4, generator=generator) + k
    y = (x.sum(1) > 4 * k).long()
    optimizer = torch.optim.SGD(net.parameters(), config["learning-rate"])
    for _ in range(config["local-epochs"]):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.state_dict(), float(loss.detach())


def client_app(seen=None, mods=(participant_mod,)):
    app = ClientApp(mods=list(mods))

    @app.train()
    def _(message, context):
        arrays = message.content["arrays"]
        if seen is not None:
            seen.append(arrays)
        k = context.node_config["partition-id"]
        state, loss = train(k, arrays.to_torch_state_dict(), message.content["config"])
        metrics = MetricRecord({"num-examples": 32 + k, "loss": loss})
        content = {"arrays": ArrayRecord(state), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    return app


class Failing(InProcessGrid):
    """One participant's first attempt fails in every round: another participant each time."""

    def __init__(self, *args):
        super().__init__(*args)
        self.failed = set()

    def _call(self, message):
        if is_query(message):
            return super()._call(message)
        server_round = message.content["config"]["server-round"]
        node = message.metadata.dst_node_id
        if node == 1 + server_round % K and server_round not in self.failed:
            self.failed.add(server_round)
            broken = copied(message, RecordDict())
            set_message_id(broken, message.metadata.message_id)
            message = broken
        return super()._call(message)


def plain(name):
    """Flower's own loop, on the grid as it is."""
    random.seed(0)
    grid, initial = grid_of(mods=(types_as_sent,)), initial_of(name)
    return result_of(STRATEGIES[name]().start(grid, initial, ROUNDS, train_config=config()))


def initial_of(name):
    """The initial model for Flower's own loop, where QFedAvg fails with counters of integers."""
    return cast_record(INITIAL, dict.fromkeys(STATISTICS, "float64") if name == QFEDAVG else {})


def types_as_sent(message, context, call_next):
    """Mod: the reply's arrays have the types of those that were sent."""
    types = types_of(message.content["arrays"])
    reply = call_next(message, context)
    reply.content["arrays"] = cast_record(reply.content["arrays"], types)
    return reply


def grid_of(seen=None, kind=InProcessGrid, mods=(participant_mod,)):
    return kind(client_app(seen, mods), K)


def config():
    return ConfigRecord({**CONFIG})


def result_of(result):
    return {name: array.numpy() for name, array in result.arrays.items()}


def ours(name, grid=None, rounds=ROUNDS, strategy=None, **kwargs):
    """The same strategy by `run`; also its history."""
    random.seed(0)
    history, strategy = History(), strategy or STRATEGIES[name]()
    result = run(
        strategy, grid or grid_of(), INITIAL, rounds, train_config=config(), history=history,
        **kwargs,
    )  # fmt: skip
    return result_of(result), history


def kinds(arrays):
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def sent_as_first(seen):
    return all(kinds(view(record)) == kinds(view(INITIAL)) for record in seen)


def trained(arrays):
    return {name: array for name, array in arrays.items() if name not in STATISTICS}


def assert_close(found, wanted, **tolerance):
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], err_msg=name, **tolerance)


def scheme(name):
    """Statistics as Flower has them, where those of a strategy are to be compared with it."""
    return {} if name in OURS else {"normalization": Average()}


# The columns ------------------------------------------------------------------------------------


def check_types(name):
    """Keys and types are as they were, in every message and at the end; else it is plain Flower."""
    seen = []
    found, history = ours(name, grid_of(seen), transport=Transport(**scheme(name)))
    assert len(seen) == K * ROUNDS
    assert sent_as_first(seen)
    assert list(found) == list(INITIAL)
    assert kinds(found) == kinds(view(INITIAL))
    assert [record.epochs_done for record in history] == [2, 4, 6]
    if name not in OURS:
        # QFedAvg's step depends on the counters, which plain Flower does not keep whole.
        atol = 5e-3 if name == QFEDAVG else 1e-5
        assert_close(trained(found), trained(plain(name)), rtol=1e-4, atol=atol)


def check_statistics(name):
    """Means, variances and counters are those of all replies pooled, in the last round too."""
    replies = {}

    class Watching(InProcessGrid):
        def _call(self, message):
            reply = super()._call(message)
            if is_query(message):
                return reply
            replies[message.content["config"]["server-round"], message.metadata.dst_node_id] = {
                n: a.copy() for n, a in view(reply.content["arrays"]).items()
            }
            return reply

    found, _ = ours(name, grid_of(kind=Watching))
    mean = RunningMean(view(INITIAL))
    for node in range(1, K + 1):
        weight = 1 if name == "`CoLearn`" else 31 + node
        mean.add(replies[ROUNDS, node], weight)
    for array in STATISTICS:
        np.testing.assert_array_equal(found[array], mean.mean()[array], err_msg=array)
    assert all((found[n] >= 0).all() for n in STATISTICS if "var" in n)


def check_restarts(name):
    """A participant that fails in every round is restarted, and nothing else is different."""
    calm, _ = ours(name)
    grid = grid_of(kind=Failing)
    found, history = ours(name, grid, transport=Transport(recovery=QUICK))
    assert grid.failed == {1, 2, 3}
    assert [len(record.restarts) for record in history] == [1, 1, 1]
    assert [len(record.participants) for record in history] == [K] * ROUNDS
    assert_same(found, calm)


def check_resume(name, tmp_path):
    """A server that is killed goes on to the same bits, in the round it was in."""
    whole, _ = ours(name, rounds=4, checkpoints=tmp_path / "whole")
    grid = grid_of()

    class Killed(BaseException):
        pass

    def kill(server_round, arrays):
        if server_round == 2:
            raise Killed

    with pytest.raises(Killed):
        ours(name, grid, 4, checkpoints=tmp_path / "killed", evaluate_fn=kill)
    random.seed(99)  # another process
    history, strategy = History(tmp_path / "history"), STRATEGIES[name]()
    result = run(
        strategy, grid, INITIAL, 4, train_config=config(), history=history,
        checkpoints=tmp_path / "killed", resume="auto",
    )  # fmt: skip
    assert [record.round for record in history] == [1, 2, 3, 4]
    assert_same(result_of(result), whole)


def check_compression(name):
    """Bytes fall, and the model stays within what rounding can do."""
    compression = Compression(up=Int8(), down=Float16())
    if name in PRIVATE:
        with pytest.raises(ColearnError, match=r"expected up=Uncompressed\(\)"):
            ours(name, transport=Transport(compression=compression))
        compression = Compression(down=Float16())
    seen = []
    transport = Transport(compression=compression, **scheme(name))
    found, history = ours(name, grid_of(seen), transport=transport)
    exact, wide = ours(name, transport=Transport(**scheme(name)))
    assert sent_as_first(seen)
    for record, full in zip(history, wide, strict=True):
        assert record.bytes_down < full.bytes_down
        assert (record.bytes_up < full.bytes_up) == (name not in PRIVATE)
    assert_close(trained(found), trained(exact), atol=0.02)
    first, _ = ours(name, rounds=1, transport=transport)
    exact, _ = ours(name, rounds=1, transport=Transport(**scheme(name)))
    # Float16 has 11 bits. Of Int8 half a step, and here no update is larger than 0.3; QFedAvg and
    # momentum step further than the mean.
    bound = 2 * (2**-11 * 1.5 + 0.3 / 127 / 2 * (name not in PRIVATE))
    assert_close(trained(first), trained(exact), atol=2 * bound)


def check_local_arrays(name):
    """Statistics stay where they are: none comes up, and the server's are never changed."""
    if name in PRIVATE:
        with pytest.raises(ColearnError, match="normalization under differential privacy"):
            ours(name, transport=Transport(normalization=LocalStatistics()))
        return
    seen = []
    transport = Transport(normalization=LocalStatistics())
    found, history = ours(name, grid_of(seen), transport=transport)
    for statistic in STATISTICS:
        np.testing.assert_array_equal(found[statistic], view(INITIAL)[statistic])
    size = sum(len(INITIAL[statistic].data) for statistic in STATISTICS)
    assert [record.bytes_up for record in history] == [K * (data_bytes(INITIAL) - size)] * ROUNDS
    last = [view(record) for record in seen[-K:]]  # each participant trains with its own
    assert len({arrays["1.running_var"].tobytes() for arrays in last}) == K
    assert all(arrays["1.num_batches_tracked"] == 2 * (ROUNDS - 1) for arrays in last)
    alone, _ = ours(name, transport=Transport(**scheme(name)))
    if name not in BY_ALL_ARRAYS:
        assert_close(trained(found), trained(alone), rtol=1e-4, atol=1e-5)


def check_combined(name):
    """Everything at once: compressed, statistics local, a failure in every round."""
    compression = Compression(up=Int8(), down=Float16())
    transport = Transport(QUICK, LocalStatistics(), compression)
    if name in PRIVATE:
        transport = Transport(QUICK, compression=Compression(down=Float16()))
    calm, _ = ours(name, transport=transport)
    grid = grid_of(kind=Failing)
    found, history = ours(name, grid, transport=transport)
    assert [len(record.restarts) for record in history] == [1, 1, 1]
    assert kinds(found) == kinds(view(INITIAL))
    assert_same(found, calm)


def assert_same(found, wanted):
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


COLUMNS = {
    "types": check_types,
    "statistics": check_statistics,
    "restarts": check_restarts,
    "resume": check_resume,
    "compression": check_compression,
    "local statistics": check_local_arrays,
    "all at once": check_combined,
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_cell_of_the_table(name, column, tmp_path):
    if column == "statistics" and name in PRIVATE:
        pytest.skip("statistics are not pooled under differential privacy: see the table")
    arguments = (name, tmp_path) if column == "resume" else (name,)
    COLUMNS[column](*arguments)


def test_the_table_of_the_document_has_these_cells():
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("|")
    ][: len(STRATEGIES) + 2]
    header, _, *body = rows
    assert [re.sub(r"[\[\]]|\(.*\)", "", cell) for cell in header[1:]] == list(COLUMNS)
    assert [row[0] for row in body] == list(STRATEGIES)
    for row in body:
        for column, cell in zip(COLUMNS, row[1:], strict=True):
            assert cell
            assert (cell == "no") == (row[0] in PRIVATE and column in NOT_PRIVATE), (row[0], column)


NOT_PRIVATE = ("statistics", "local statistics")


# A connected grid under Flower's own loop -------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in OURS])
def test_a_connected_grid_is_all_that_a_strategys_own_loop_needs(name):
    seen, transport = [], Transport(QUICK, compression=Compression(down=Float16()))
    grid = grid_of(seen, Failing, (participant_mod, types_as_sent))
    connected = transport.connect(grid)
    random.seed(0)
    initial = initial_of(name)
    result = STRATEGIES[name]().start(connected, initial, ROUNDS, train_config=config())
    assert all(kinds(view(record)) == kinds(view(initial)) for record in seen)
    assert grid.failed == {1, 2, 3}
    traffic = connected.take()
    assert [event.kind for event in traffic.events] == ["restart"] * 3
    assert traffic.models.up == K * ROUNDS
    assert traffic.bytes.down < traffic.bytes.up
    assert traffic.names == {node: f"partition-{node - 1}" for node in range(1, K + 1)}
    assert_close(trained(result_of(result)), trained(plain(name)), atol=0.02)
