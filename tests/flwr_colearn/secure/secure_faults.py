"""Participants of a run under secure aggregation that drop out in the stages a test names."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import InProcessGrid, LocalPlan, participant_mod
from flwr_colearn._flwr import set_message_id

K = 5
MODEL = {
    "fc.weight": np.linspace(-1, 1, 600).astype(np.float32).reshape(20, 30),
    "fc.bias": np.linspace(-1, 1, 7),
    "scalar": np.array(0.5, np.float16),
    "bn.running_mean": np.zeros(3, np.float32),
    "bn.running_var": np.ones(3, np.float32),
    "bn.num_batches_tracked": np.array(3),
}
EXAMPLES = (10, 30, 20, 25, 15)


def record_of(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def step(k, server_round, arrays):
    """Participant k's model of a round: its own, the same in every attempt."""
    generator = np.random.default_rng([k, server_round])
    trained = {}
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            trained[name] = array + (k + 1)
            continue
        moved = array + generator.normal(0, 0.1, array.shape)
        trained[name] = np.asarray(np.abs(moved) if name.endswith("var") else moved, array.dtype)
    return trained


def app_of(step=step, mods=(), outside=()):
    app = ClientApp(mods=[*outside, participant_mod, *mods])

    @app.train()
    def _(message, context):
        k, config = context.node_config["partition-id"], message.content["config"]
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        if "local-epochs" in config:
            assert len(list(LocalPlan.from_config(config)))
        app.trainings.append((config["server-round"], k))
        metrics = MetricRecord({"num-examples": EXAMPLES[k % K], "loss": k / 4})
        trained = record_of(step(k, config["server-round"], arrays))
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def _(message, context):
        metrics = MetricRecord({"num-examples": 1, "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    app.trainings = []
    return app


def stage_of(message):
    """The stage of secure aggregation that a message is of; None for others."""
    return dict(message.content.get("colearn.secure", {})).get("stage")


@dataclass(frozen=True)
class Received:
    """A reply as it arrived, which the server changes later."""

    reply_to: str
    message_id: str
    content: RecordDict

    @classmethod
    def of(cls, reply):
        content = reply.content if reply.has_content() else {}
        copies = RecordDict({name: type(each)({**each}) for name, each in content.items()})
        metadata = reply.metadata
        return cls(metadata.reply_to_message_id, metadata.message_id, copies)


class DroppingGrid(InProcessGrid):
    """A grid on which ``drops[round, stage, attempt]`` lists the participants that drop out.

    A participant may drop out by an error ("error"), by silence ("silence"), or by a reply that
    arrives after the next stage has begun ("late").

    Attributes
    ----------
    received : list of Received
        Everything that arrived at the server; errors have no content.
    stages : list of (int, str, int)
        The stages, with round and attempt, in order.
    """

    def __init__(self, app, k=K, drops=None, how="error", **kwargs):
        super().__init__(app, k, **kwargs)
        self.drops, self.how = drops or {}, how
        self.received, self.sent, self.stages = [], [], []
        self._late = defaultdict(list)

    def push_messages(self, messages):
        batch = list(messages)
        for message in batch:
            self.sent.append(message)
            request = dict(message.content.get("colearn.secure", {}))
            key = (request.get("round"), request.get("stage"), request.get("attempt"))
            if request and key not in self.stages:
                self.stages.append(key)
        return super().push_messages(batch)

    def pull_messages(self, message_ids):
        arrived = []
        for message_id in message_ids:
            message = self._pushed.get(message_id)
            if message is None:
                continue
            if not self._drops(message):
                arrived += super().pull_messages([message_id])
            elif self.how == "error":
                del self._pushed[message_id]
                reply = Message(Error(5, "gone"), reply_to=message)
                set_message_id(reply, f"error-{message_id}")
                reply.metadata.__dict__["_src_node_id"] = 1
                arrived.append(reply)
            elif self.how == "late" and not self._late[message_id]:
                self._late[message_id] = super().pull_messages([message_id])
                self._pushed[message_id] = message
        self.received += [Received.of(reply) for reply in arrived]
        return arrived

    def late_replies(self):
        """The replies that a participant sent and that nobody pulled."""
        return [reply for replies in self._late.values() for reply in replies]

    def _drops(self, message):
        request = dict(message.content.get("colearn.secure", {}))
        key = (request.get("round"), request.get("stage"), request.get("attempt"))
        return message.metadata.dst_node_id - 1 in self.drops.get(key, ())
