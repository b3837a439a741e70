"""The folder ``state-dir`` of a participant: what it keeps between rounds, on its disk."""

import hashlib
from collections.abc import Callable
from logging import WARNING
from pathlib import Path
from urllib.parse import quote

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common import log

from ._flwr import state_from_bytes, state_to_bytes
from .records import config_of, kind_of, records_of

SESSION = "colearn.session"
"""Key in ``context.state`` of the session that the state belongs to."""

_DIGEST = hashlib.sha256
_DIGEST_BYTES = 32


def with_state_dir(
    message: Message,
    context: Context,
    call_next: Callable[[Message, Context], Message],
    name: str = "participant",
) -> Message:
    """Flower mod that keeps ``context.state`` in a file, where the node config has a ``state-dir``.

    Flower's state ends with the SuperNode and with the run, and a server that resumes is a new run.
    The file, one for each participant, outlives both: it is written after every training, and read
    when a message of the same session finds an empty state. It holds all that mods and the
    ClientApp keep in ``context.state``: what compression rounded away, local arrays, the state of
    an optimizer. What another session left is not read. A damaged file is a lost one.

    Parameters
    ----------
    message, context, call_next
        As Flower gives them to a mod.
    name : str
        The participant's, which names its file.
    """
    folder, session = (
        context.node_config.get("state-dir"),
        config_of(message.content).get("session"),
    )
    if not folder or session is None:
        return call_next(message, context)
    path = Path(str(folder)) / f"{quote(name, safe='')}.state"
    mark = ConfigRecord({"session": str(session)})
    if records_of(context.state, ConfigRecord).get(SESSION) != mark:
        kept = _read(path)
        if records_of(kept, ConfigRecord).get(SESSION) == mark:
            context.state = kept
    reply = call_next(message, context)
    if kind_of(message) == MessageType.TRAIN and reply.has_content() and len(context.state):
        context.state[SESSION] = mark
        _write(path, context.state)
    return reply


def _read(path: Path) -> RecordDict:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return RecordDict()
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if _DIGEST(content).digest() != digest:
        log(WARNING, "State: %s is damaged; this participant begins anew", path)
        return RecordDict()
    return state_from_bytes(content)


def _write(path: Path, state: RecordDict) -> None:
    content = state_to_bytes(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(_DIGEST(content).digest() + content)
    scratch.replace(path)  # a process that is killed here leaves the file before
