"""Participants that fail to order, on a clock that only the tests move."""

import errno
import io
import os
import random
import sys
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import (
    CoLearn,
    CyclicalRate,
    IncreasingEpochs,
    InProcessGrid,
    LocalPlan,
    participant_mod,
)

K = 4
EXAMPLES = (1, 3, 2, 2)  # adding up to a power of two: averaged metrics are exact in any order
MODEL = {
    "fc.weight": np.full((2, 3), 5, np.float32),
    "fc.bias": np.linspace(-1, 1, 3),  # float64: the last bit depends on the order of summation
    "bn.running_mean": np.zeros(2, np.float32),
    "bn.running_var": np.ones(2, np.float32),
    "bn.num_batches_tracked": np.array(0),
}


def record_of(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def numpy_of(record):
    return {name: array.numpy() for name, array in record.items()}


def bits(record):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in numpy_of(record).items()}


def train(k, plan, arrays):
    """What participant k makes of a model: its own way towards an optimum that never rests."""
    model = dict(arrays)
    for epoch in plan:
        for name, array in model.items():
            step = array - (plan.round + k / 3) if array.dtype.kind == "f" else -(k + 1)
            rate = epoch.learning_rate if array.dtype.kind == "f" else 1
            model[name] = (array - rate * step).astype(array.dtype)
    return model


def participants(train=train, mods=(), named=True):
    """A ClientApp in three lines of co-learning; without its mod, and so a name, if not `named`."""
    app = ClientApp(mods=[*mods, participant_mod] if named else list(mods))

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        plan = LocalPlan.from_config(message.content["config"])
        model = train(k, plan, numpy_of(message.content["arrays"]))
        metrics = MetricRecord({"num-examples": EXAMPLES[k % K], "loss": float(k)})
        content = RecordDict({"arrays": record_of(model), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _(message, context):
        k = context.node_config["partition-id"]
        metrics = MetricRecord({"num-examples": EXAMPLES[k % K], "accuracy": k / 8})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


# Faults -----------------------------------------------------------------------------------------


EXPLOSIONS = []


def explode():
    EXPLOSIONS.append("someone unpickled what a participant sent")


class Bomb:
    """Explodes when it is unpickled."""

    def __reduce__(self):
        return explode, ()


def serialised(array, **kwargs):
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def _replace(value):
    return lambda content: content["arrays"].update({"fc.bias": Array(np.asarray(value))})


def _with_bytes(change):
    def spoil(content):
        array = content["arrays"]["fc.bias"]
        data = change(array.data)
        content["arrays"]["fc.bias"] = Array(array.dtype, array.shape, array.stype, data)

    return spoil


BAD_REPLIES = {  # kind: what it does to a good reply's content, and what the record says
    "NaN": (_replace([0, np.nan, 0]), "found NaN or Inf"),
    "Inf": (_replace([0, 0, -np.inf]), "found NaN or Inf"),
    "missing key": (lambda content: content["arrays"].pop("fc.bias"), "1 missing"),
    "extra key": (lambda content: content["arrays"].update(x=Array(np.ones(2))), "1 unknown"),
    "wrong shape": (_replace(np.ones((3, 1))), r"shape \(3, 1\)"),
    "wrong type": (_replace(np.ones(3, np.float32)), "expected float64"),
    "wrong round": (lambda content: content["colearn"].update({"server-round": -1}), "found -1"),
    "no examples": (lambda content: content["metrics"].update({"num-examples": 0}), "positive"),
    "no MetricRecord": (lambda content: content.pop("metrics"), "one MetricRecord"),
    "two ArrayRecords": (
        lambda content: content.update(more=record_of(MODEL)),
        "one ArrayRecord",
    ),
    "truncated bytes": (_with_bytes(lambda data: data[:-1]), "a serialised numpy array"),
    "corrupt bytes": (_with_bytes(lambda data: b"\0" + data[1:]), "a serialised numpy array"),
    "pickled objects": (
        _with_bytes(lambda data: serialised(np.array([Bomb()] * 3), allow_pickle=True)),
        "Python objects",
    ),
}
FAILURES = {  # kind: what the record says
    "raises": "code 2.: OSError: disk on fire",
    "code 0": "code 0",
    "code 5": "code 5",
    "code 8": "code 8",
    "leaves": "code 5",
    "comes back as another node": "code 5",
    "lost": "no reply within",
    "late": "no reply within",
    "not accepted": "not accepted",
}
UNSEEN = ("duplicate",)
FAULTS = (*FAILURES, *BAD_REPLIES, *UNSEEN)


def random_faults(seed, rounds, k=K, share=0.3, most=3):
    """A schedule in which participants fail up to `most` times in a row, in every way."""
    rng = random.Random(seed)
    # Different ones, since a participant whose reply is refused twice for one reason is given up.
    reasons = {kind: kind if kind != "Inf" else "NaN" for kind in FAULTS}
    faults = {}
    for round_ in range(1, rounds + 1):
        for participant in range(k):
            drawn = rng.sample(FAULTS, rng.randint(1, most)) if rng.random() < share else ()
            kinds = {reasons[kind]: kind for kind in drawn}.values()
            for attempt, kind in enumerate(kinds):
                faults[round_, participant, attempt] = kind
    return faults


class Clock:
    """Stands in for the module `time` in all of flwr_colearn: sleeping is what makes time pass."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for name, module in list(sys.modules.items()):
            if name.startswith("flwr_colearn.") and getattr(module, "time", None) is time:
                monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now

    time = perf_counter = monotonic

    def sleep(self, seconds):
        self.now += seconds


@dataclass(frozen=True)
class Attempt:
    """A train message that was pushed."""

    round: int
    k: int
    node_id: int
    at: float
    ttl: float
    time_limit: float | None


class FaultyGrid(InProcessGrid):
    """An InProcessGrid on which attempts fail as ``faults[round, k, attempt]`` says.

    Rounds count from 1, participants and attempts from 0. A reply is there when the clock says
    that its training is over, and like Flower's the grid ignores a Message that it has seen.

    Attributes
    ----------
    injected : list of (round, k, kind)
        The faults that came about.
    attempts : list of Attempt
        All train messages, in order.
    partitions : dict
        The partition-id of every node that there ever was.
    bytes_up : Counter
        Bytes of arrays in all replies that were pulled, by the round that was under way.
    seconds_per_epoch, away : float
        What a local epoch takes, and for how long a node leaves.
    registered : dict
        Names of nodes under SuperNode authentication.
    """

    def __init__(self, clock, faults=None, k=K, train=train, named=True, **kwargs):
        app = participants(train, mods=[self._spoil], named=named)
        super().__init__(app, k, **kwargs)
        self.clock, self.faults = clock, dict(faults or {})
        self.injected, self.attempts = [], []
        self.partitions = {node: node - 1 for node in self.contexts}
        self.registered = {}
        self.seconds_per_epoch, self.away = 0.0, 30.0
        self.bytes_up = Counter()
        self._seen, self._count, self._fault = {}, Counter(), None
        self._away, self._mail, self._unasked, self._held = [], [], [], defaultdict(list)

    def leave(self, node_id, come_back_as=None, seconds=None):
        """Disconnect a node, and let it come back after some seconds; ``inf``: never."""
        back_at = self.clock.now + (self.away if seconds is None else seconds)
        self._away.append((back_at, come_back_as or node_id, self.contexts.pop(node_id)))

    def join(self, node_id, **node_config):
        """Connect a node that was not there before."""
        self.partitions[node_id] = node_config["partition-id"]
        self.contexts[node_id] = Context(1, node_id, node_config, RecordDict(), {})

    def new_id(self):
        return max(99, *self.partitions) + 1

    def get_node_ids(self):
        for back in [each for each in self._away if each[0] <= self.clock.now]:
            self._away.remove(back)
            self.join(back[1], **back[2].node_config)
        return list(self.contexts)

    def get_nodes(self):
        return [
            SimpleNamespace(node_id=node, name=self.registered.get(node, ""))
            for node in self.get_node_ids()
        ]

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids):
        ids = set(message_ids)
        there = [
            reply
            for ready, reply in self._mail
            if ready <= self.clock.now and reply.metadata.reply_to_message_id in ids
        ]
        self._mail = [each for each in self._mail if not any(each[1] is one for one in there)]
        unasked, self._unasked = self._unasked, []
        round_ = self.attempts[-1].round if self.attempts else 0
        for reply in unasked + there:
            if reply.has_content():
                records = reply.content.array_records.values()
                arrays = [array for record in records for array in record.values()]
                self.bytes_up[round_] += sum(len(array.data) for array in arrays)
        return unasked + there

    def _push(self, message):
        node_id = message.metadata.dst_node_id
        if id(message) in self._seen or node_id not in self.contexts:
            return None
        self._seen[id(message)] = message
        message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        if not _is_training(message):
            return self._deliver(self._call(message))
        config = message.content["config"]
        round_, k = config["server-round"], self.partitions[node_id]
        limit, ttl = config.get("time-limit"), message.metadata.ttl
        self.attempts.append(Attempt(round_, k, node_id, self.clock.now, ttl, limit))
        self._fault = self.faults.get((round_, k, self._count[round_, k]))
        self._count[round_, k] += 1
        if self._fault is not None:
            self.injected.append((round_, k, self._fault))
        if self._fault == "not accepted":
            return None
        self._unasked += self._held.pop(k, [])
        reply = self._in_transit(message, self._call(message))
        if reply is None:
            return message.metadata.message_id
        seconds = self.seconds_per_epoch * config["local-epochs"]
        return self._deliver(reply, 0.0 if reply.has_error() else seconds)

    def _deliver(self, reply, seconds=0.0):
        self._mail.append((self.clock.now + seconds, reply))
        return reply.metadata.reply_to_message_id

    def _in_transit(self, message, reply):
        """What becomes of a reply on its way; None if it does not arrive in time."""
        fault, node_id = self._fault, message.metadata.dst_node_id
        if fault == "lost":
            return None
        if fault == "late":  # it arrives, uncalled for, after the next message was pushed
            poison = {name: array + 99 for name, array in numpy_of(reply.content["arrays"]).items()}
            reply.content["arrays"] = record_of(poison)
            self._held[self.partitions[node_id]].append(reply)
            return None
        if fault == "duplicate":  # twice now, and once more in the next round
            self._deliver(reply)
            self._held[self.partitions[node_id]].append(reply)
            return reply
        if fault in ("leaves", "comes back as another node"):
            self.leave(node_id, come_back_as=None if fault == "leaves" else self.new_id())
            self.partitions.setdefault(self._away[-1][1], self.partitions[node_id])
        codes = {"code 0": 0, "code 8": 8}
        if fault in codes or FAILURES.get(fault) == "code 5":
            reply = Message(Error(codes.get(fault, 5), "Flower says so"), reply_to=message)
            if fault not in codes:  # what Flower does when a SuperNode is gone
                reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    def _spoil(self, message, context, call_next):
        """Flower mod: what goes wrong on the participant's side."""
        if not _is_training(message):
            return call_next(message, context)
        if self._fault == "raises":
            raise OSError("disk on fire")
        reply = call_next(message, context)
        if self._fault in BAD_REPLIES:
            BAD_REPLIES[self._fault][0](reply.content)
        return reply


def is_query(message):
    """Whether a message asks for the participant's name, and for nothing else."""
    return "ask" in message.content.get("colearn", {})


def _is_training(message):
    """Whether a message asks for training, and not only for the participant's name."""
    return message.metadata.message_type == "train" and "config" in message.content


# Runs -------------------------------------------------------------------------------------------


def strategy_of(k=K, **kwargs):
    rules = {
        "local_epochs": IncreasingEpochs(1, epsilon=0.05, maximum=8),
        "learning_rate": CyclicalRate(0.2),
    }
    return CoLearn(k, **{**rules, **kwargs})


def outcome(strategy, result):
    """All of a run that faults from which it recovered must not change."""
    traffic = ("bytes_down", "bytes_up", "control_down", "control_up", "evaluation")
    changed_by_faults = ("restarts", "refusals", "seconds", *traffic)
    records = [asdict(record) for record in strategy.history]
    for record in records:
        for name in changed_by_faults:
            del record[name]
    metrics = [
        {round_: dict(metrics) for round_, metrics in by_round.items()}
        for by_round in (
            result.train_metrics_clientapp,
            result.evaluate_metrics_clientapp,
            result.evaluate_metrics_serverapp,
        )
    ]
    return bits(result.arrays), records, metrics


_FSYNC = os.fsync


def fsync_of_cifs(fd):
    """What CIFS and FUSE do: they flush files, and answer EINVAL for a folder."""
    if os.path.isdir(f"/proc/self/fd/{fd}"):
        raise OSError(errno.EINVAL, "Invalid argument")
    _FSYNC(fd)
