"""The folder ``state-dir``: a participant's client state, saved on its disk between rounds."""

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
"""The key in ``context.state`` for the session of the state."""

_DIGEST = hashlib.sha256
_DIGEST_BYTES = 32


def with_state_dir(
    message: Message,
    context: Context,
    call_next: Callable[[Message, Context], Message],
    name: str = "participant",
) -> Message:
    """Flower mod that saves ``context.state`` to a file if the node config has a ``state-dir``.

    Flower drops the state at the end of the SuperNode and of the run, and a resumed server is a new
    run. The file, one for each participant, remains: it is written after every training, and read
    for a message of its session if ``context.state`` is of another or no session. It holds
    everything that mods and the ClientApp store in ``context.state``: the residuals of compression,
    local arrays, the state of an optimizer. A file of another session, and a damaged one, is not
    used.

    Parameters
    ----------
    message, context, call_next
        The arguments that Flower gives to a mod.
    name : str
        The participant's name, which is the file's name.
    """
    folder, session = (
        context.node_config.get("state-dir"),
        config_of(message.content).get("session"),
    )
    if not folder or session is None:
        return call_next(message, context)
    # Quoted, since a name from the node config may hold a slash.
    path = Path(str(folder)) / f"{quote(name, safe='')}.state"
    mark = ConfigRecord({"session": str(session)})
    # A state with the session's mark is newer than the file or the same, and is not replaced.
    if records_of(context.state, ConfigRecord).get(SESSION) != mark:
        kept = _read(path)
        if records_of(kept, ConfigRecord).get(SESSION) == mark:
            context.state = kept
    reply = call_next(message, context)
    # Only after a success: the state that a failed training left may be inconsistent.
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
    # Training without the state is correct, though slower to converge: no reason for an error.
    if _DIGEST(content).digest() != digest:
        log(WARNING, "State: %s is damaged; this participant is reinitialised", path)
        return RecordDict()
    return state_from_bytes(content)


def _write(path: Path, state: RecordDict) -> None:
    content = state_to_bytes(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(_DIGEST(content).digest() + content)
    # Atomic: if the process is killed before this line, the previous file is complete.
    scratch.replace(path)
