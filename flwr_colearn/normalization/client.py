"""The participant's half of normalization schemes: what stays is kept here and never sent."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common import log

from ..aggregation.sgd import SGD
from ..errors import ColearnError
from ..records import records_of, to_record, view
from ..recovery.client import name_of
from ..roles import NDArray

RECORD = "normalization"
"""Key of the ConfigRecord that the server adds for the mod, of the mod's answer, and of its state.
"""

_VELOCITY = "|velocity"


@dataclass
class LocalArrays:
    """What a participant keeps: its arrays before and after the last round that it trained.

    The former are for a round that is repeated, by a restart or by a server that resumed: it must
    begin from what it began from the first time.
    """

    round: int = 0
    before: dict[str, NDArray] = field(default_factory=dict)
    after: dict[str, NDArray] = field(default_factory=dict)

    def at(self, server_round: int, training: bool) -> dict[str, NDArray]:
        """Return the arrays to begin a round with (or to evaluate with); empty if there are none.

        Round 1 begins a run, so what an earlier run left is no part of it; nor is what was kept
        in a later round than this one.
        """
        if not training:
            return self.after if self.round <= server_round else {}
        if server_round == 1 or self.round > server_round:
            return {}
        return self.before if self.round == server_round else self.after


def normalization_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Flower mod that keeps what a scheme of `flwr_colearn.Normalization` leaves with participants.

    A message brings the arrays that travel; the user's function gets the whole model, with the
    participant's own arrays in their places, and may return the whole model: only what travels
    leaves. What stays lies in ``context.state`` and, where the node config has a ``state-dir``, in
    a file there as well, since the state ends with its SuperNode. A participant that has lost it
    says so in its log and to the server, and begins again from the shared model's arrays.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod, normalization_mod])
    """
    asked = records_of(message.content, ConfigRecord).get(RECORD) if message.has_content() else None
    if asked is None:
        return call_next(message, context)
    del message.content[RECORD]
    server_round = _whole(asked, "round")
    kept = dict(zip(_strings(asked, "kept"), _numbers(asked, "positions"), strict=True))
    training = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
    (key, sent), *_ = records_of(message.content, ArrayRecord).items()
    local = _load(context, kept).at(server_round, training)
    if not local and not all(name in sent for name in kept):
        log(
            WARNING,
            "Normalization: round %s: the local arrays are lost; asking for the shared model's",
            server_round,
        )
        return Message(RecordDict({RECORD: ConfigRecord({"lost": True})}), reply_to=message)
    fresh = bool(kept) and not local
    if fresh:
        _log_fresh(server_round, len(kept))
        local = view(ArrayRecord({name: sent[name] for name in kept}))
    own = {name: array for name, array in local.items() if not name.endswith(_VELOCITY)}
    message.content[key] = _merged(sent, own, kept)
    reply = call_next(message, context)
    if not training or not reply.has_content():
        return reply
    for name, record in list(records_of(reply.content, ArrayRecord).items()):
        if kept:
            after = _own_arrays(view(record), local, kept, _strings(asked, "stepped"), asked)
            _save(context, LocalArrays(server_round, local, after))
        returned = set(_strings(asked, "returned"))
        reply.content[name] = ArrayRecord({n: a for n, a in record.items() if n in returned})
    reply.content[RECORD] = ConfigRecord({"fresh": fresh and server_round > 1})
    return reply


def _own_arrays(
    trained: Mapping[str, NDArray],
    local: Mapping[str, NDArray],
    kept: Mapping[str, int],
    stepped: list[str],
    asked: ConfigRecord,
) -> dict[str, NDArray]:
    """Return what to keep: the reply's arrays or, where those are gradients, a step of SGD."""
    missing = [name for name in kept if name not in trained]
    if missing:
        raise ColearnError(
            f"reply: expected the arrays that stay here too, to be kept by normalization_mod, "
            f"found {len(missing)} missing {missing[:3]}"
        )
    own = {name: trained[name].copy() for name in kept}
    if stepped:
        rate, momentum, decay = _reals(asked, "sgd")
        velocity = {name: local[name + _VELOCITY] for name in stepped if name + _VELOCITY in local}
        weights = {name: local[name] for name in stepped}
        new, velocity = SGD(momentum, decay).step(weights, trained, velocity, rate)
        own.update(new)
        own.update({name + _VELOCITY: array for name, array in velocity.items()})
    return own


def _merged(sent: ArrayRecord, own: Mapping[str, NDArray], kept: Mapping[str, int]) -> ArrayRecord:
    """Return the whole model in its own order, the participant's arrays in their places."""
    names = [name for name in sent if name not in kept]
    for name, position in kept.items():
        names.insert(position, name)
    mine = to_record(dict(own))
    return ArrayRecord({name: mine[name] if name in kept else sent[name] for name in names})


def _log_fresh(server_round: int, count: int) -> None:
    if server_round == 1:
        log(INFO, "Normalization: %s arrays stay here from now on", count)
    else:
        log(
            WARNING,
            "Normalization: round %s: no local arrays here; starting from the shared model's %s",
            server_round,
            count,
        )


def _load(context: Context, kept: Mapping[str, int]) -> LocalArrays:
    """Return what is kept in the context's state or the state folder, if it fits the model."""
    record = records_of(context.state, ConfigRecord).get(RECORD)
    if record is not None:
        before, after = (
            records_of(context.state, ArrayRecord)[f"{RECORD}.{n}"] for n in ("before", "after")
        )
        arrays = LocalArrays(_whole(record, "round"), view(before), view(after))
    else:
        arrays = _read(context)
    return arrays if set(kept) <= set(arrays.after) else LocalArrays()


def _save(context: Context, arrays: LocalArrays) -> None:
    context.state[RECORD] = ConfigRecord({"round": arrays.round})
    context.state[f"{RECORD}.before"] = to_record(arrays.before)
    context.state[f"{RECORD}.after"] = to_record(arrays.after)
    path = _path(context)
    if path is None:
        return
    content = io.BytesIO()
    named = {f"before/{name}": array for name, array in arrays.before.items()}
    named |= {f"after/{name}": array for name, array in arrays.after.items()}
    np.savez(content, round=np.asarray(arrays.round), **named)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(content.getvalue())
    scratch.replace(path)


def _read(context: Context) -> LocalArrays:
    path = _path(context)
    if path is None or not path.exists():
        return LocalArrays()
    try:
        with np.load(path) as file:
            split: dict[str, dict[str, NDArray]] = {"before": {}, "after": {}}
            for key in file.files:
                half, _, name = key.partition("/")
                if name:
                    split[half][name] = file[key]
            return LocalArrays(int(file["round"]), **split)
    except Exception as error:  # whatever is in a damaged file, the shared model's arrays are there
        log(WARNING, "Normalization: %s is unusable: %s", path, error)
        return LocalArrays()


def _path(context: Context) -> Path | None:
    """Return the file of this participant's arrays, or None without a ``state-dir``."""
    folder = context.node_config.get("state-dir")
    if not folder:
        return None
    name = name_of(context).get("participant", "participant")
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return Path(str(folder)) / f"normalization-{safe}.npz"


def _whole(record: ConfigRecord, key: str) -> int:
    value = record[key]
    assert isinstance(value, int)
    return value


def _strings(record: ConfigRecord, key: str) -> list[str]:
    return [str(value) for value in record.get(key, [])]  # type: ignore[union-attr]


def _numbers(record: ConfigRecord, key: str) -> list[int]:
    return [int(value) for value in record.get(key, [])]  # type: ignore[union-attr]


def _reals(record: ConfigRecord, key: str) -> list[float]:
    return [float(value) for value in record[key]]  # type: ignore[union-attr]
