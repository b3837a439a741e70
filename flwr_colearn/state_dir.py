"""The folder ``state-dir``: a participant's client state, saved on its disk between rounds."""

import hashlib
from collections.abc import Callable
from logging import WARNING
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common import log

from ._flwr import state_from_bytes, state_to_bytes
from .files import replace_file
from .records import config_of, kind_of, records_of
from .site_files import remove_old, state_path

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
    run. The file remains. Every session of every participant has a file of its own, so that runs at
    the same time do not disturb each other; the files of the last three sessions are kept. It
    is written after every training, and read for a message of its session if ``context.state`` is
    of another or no session. It holds everything that mods and the ClientApp store in
    ``context.state``: the residuals of compression, local arrays, the state of an optimizer. A file
    of another session, and a damaged one, is not used. If the folder cannot be read or written, the
    log has a warning, and the training goes on.

    Parameters
    ----------
    message, context, call_next
        The arguments that Flower gives to a mod.
    name : str
        The participant's name, from which the file's name is made.
    """
    folder, session = (
        context.node_config.get("state-dir"),
        config_of(message.content).get("session"),
    )
    if not folder or session is None:
        return call_next(message, context)
    path = state_path(Path(str(folder)), name, str(session))
    mark = ConfigRecord({"session": str(session)})
    # A state with the session's mark is newer than the file or the same, and is not replaced.
    if records_of(context.state, ConfigRecord).get(SESSION) != mark:
        kept = _read(path)
        # The names of files have digests only, and the state itself says its session.
        if records_of(kept, ConfigRecord).get(SESSION) == mark:
            context.state = kept
    reply = call_next(message, context)
    # Only after a success: the state that a failed training left may be inconsistent.
    if kind_of(message) == MessageType.TRAIN and reply.has_content() and len(context.state):
        context.state[SESSION] = mark
        _write(path, context.state)
    return reply


def _read(path: Path) -> RecordDict:
    # Training without the state is correct, though slower to converge: no reason for an error.
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return RecordDict()
    except OSError as error:
        log(WARNING, "State: not read, so this participant is reinitialised: %s", error)
        return RecordDict()
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if _DIGEST(content).digest() != digest:
        log(WARNING, "State: %s is damaged; this participant is reinitialised", path)
        return RecordDict()
    return state_from_bytes(content)


def _write(path: Path, state: RecordDict) -> None:
    content = state_to_bytes(state)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Atomic: if the process is killed in the middle, the previous file is complete.
        replace_file(path, _DIGEST(content).digest() + content)
        remove_old(path)
    # The training has succeeded, and only a later restart of the SuperNode will miss the state.
    except OSError as error:
        log(
            WARNING,
            "State: not saved, so a restart of this SuperNode will reinitialise the participant: "
            "%s; expected that it can write the folder 'state-dir' of its node config",
            error,
        )
