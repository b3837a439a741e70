"""All uses of Flower's non-public modules, and the code for differences between its versions."""

import inspect
from collections.abc import Iterable
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import combine_shares as combine_shares
from flwr.common.secure_aggregation.crypto.shamir import create_shares as create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt as decrypt
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt as encrypt
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    generate_shared_key as generate_shared_key,
)
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.server.client_proxy import ClientProxy as ClientProxy
from flwr.server.server import fit_clients as fit_clients
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import (
    aggregate_metricrecords as aggregate_metricrecords,
)
from flwr.serverapp.strategy.strategy_utils import config_to_str as config_to_str
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key as bytes_to_private_key,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key as bytes_to_public_key,
)
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs as generate_key_pairs,
)
from flwr.supercore.primitives.asymmetric import (
    private_key_to_bytes as private_key_to_bytes,
)
from flwr.supercore.primitives.asymmetric import (
    public_key_to_bytes as public_key_to_bytes,
)

REFUSED = 1000
"""Error code of a reply that a layer of this package refused. Flower's own codes are smaller."""

CLIENT_RAISED = 2
"""Flower's code for an exception in a ClientApp."""

RAISING_CODES = (1, CLIENT_RAISED, 6, 7)
"""Flower's codes for an exception: while the ClientApp is loaded, in it, in a mod, in a FAB."""

NODE_UNAVAILABLE = 5
"""Flower's code for a SuperNode that is no longer connected."""

CLIENT_CRASHED = 8
"""Flower's code for a ClientApp process that ended without a reply."""


def set_message_id(message: Message, message_id: str) -> None:
    """Set a message's id, as Flower's grids do when they push the message."""
    # Flower's Metadata has no setter for the id, so the attribute behind the property is written.
    message.metadata.__dict__["_message_id"] = message_id


def copied(
    message: Message,
    content: RecordDict,
    node_id: int | None = None,
    ttl: float | None = None,
) -> Message:
    """Return a new message like another, without its id, with what is given in place of its own."""
    metadata = message.metadata
    return Message(
        content=content,
        dst_node_id=metadata.dst_node_id if node_id is None else node_id,
        message_type=metadata.message_type,
        ttl=metadata.ttl if ttl is None else ttl,
        group_id=metadata.group_id,
    )


def error_reply(sent: Message, reply: Message, code: int, reason: str) -> Message:
    """Return an error reply to `sent` that takes the place of `reply`."""
    failed = Message(Error(code, reason), reply_to=sent)
    set_message_id(failed, reply.metadata.message_id)
    return failed


def state_to_bytes(state: RecordDict) -> bytes:
    """Return a participant's state as bytes, as Flower writes it for messages."""
    data: bytes = recorddict_to_proto(state).SerializeToString()
    return data


def state_from_bytes(data: bytes) -> RecordDict:
    """Return the state that `state_to_bytes` serialised."""
    return recorddict_from_proto(RecordDictProto.FromString(data))


def nodes_of(grid: Grid) -> Iterable[Any]:
    """Return Flower's descriptions of the connected nodes; none where the grid has no such method.

    Flower 1.29 has only ids of nodes, and the method `get_nodes` came later.
    """
    get_nodes = getattr(grid, "get_nodes", None)
    return get_nodes() if get_nodes is not None else ()


def node_names(grid: Grid) -> dict[int, str]:
    """Return the registered names of the connected nodes that have one, by node id."""
    named = {info.node_id: getattr(info, "name", "") for info in nodes_of(grid)}
    return {node_id: name for node_id, name in named.items() if name}


def is_private(strategy: object) -> bool:
    """Return whether a strategy is one of Flower's differential privacy wrappers."""
    # By name: the wrappers have no common base class but Strategy.
    return any(
        kind.__module__.startswith("flwr.") and kind.__name__.startswith("DifferentialPrivacy")
        for kind in type(strategy).__mro__
    )


def called_privately() -> bool:
    """Return whether a differential privacy wrapper is among the callers of this function.

    A wrapper does not say to the strategy within it that it is wrapped, and in Flower's own loop
    nothing else of this package is called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if is_private(frame.f_locals.get("self")):
            return True
        frame = frame.f_back
    return False


def calling_strategy() -> Strategy | None:
    """Return the outermost strategy among the callers of this function, or None.

    In Flower's own loop nothing but a strategy's messages reaches a layer of this package.
    """
    found, frame = None, inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Strategy):
            found = frame.f_locals["self"]
        frame = frame.f_back
    return found


def assume_identity() -> None:
    """Make ``Message(...)`` callable outside a Flower run, which needs an identity since 1.38."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # flwr < 1.38 needs no identity
        return
    for name in ("task_id", "run_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:  # not set; an identity that Flower set must stay
            setattr(TaskIdentity, name, 1)


def empty_run(run_id: int) -> Any:
    """Return Flower's description of a run that has nothing but its id."""
    try:
        from flwr.supercore.run import Run
    except ImportError:  # flwr < 1.38
        from flwr.common.typing import Run  # type: ignore[attr-defined,no-redef]
    return Run.create_empty(run_id)


__all__ = [
    "CLIENT_CRASHED",
    "CLIENT_RAISED",
    "NODE_UNAVAILABLE",
    "RAISING_CODES",
    "REFUSED",
    "ClientProxy",
    "aggregate_metricrecords",
    "assume_identity",
    "bytes_to_private_key",
    "bytes_to_public_key",
    "called_privately",
    "calling_strategy",
    "combine_shares",
    "config_to_str",
    "copied",
    "create_shares",
    "decrypt",
    "empty_run",
    "encrypt",
    "error_reply",
    "fit_clients",
    "generate_key_pairs",
    "generate_shared_key",
    "is_private",
    "node_names",
    "nodes_of",
    "private_key_to_bytes",
    "public_key_to_bytes",
    "set_message_id",
]
