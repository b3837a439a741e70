"""FolderLock: keeps a folder for one run at a time."""

import errno
import os
import socket
from datetime import datetime
from logging import WARNING
from pathlib import Path

from flwr.common import log

from .errors import ColearnError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
"""The name of the lock's file in the folder."""

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
"""The error codes of flock for a lock that somebody else holds."""


class FolderLock:
    """A lock on a folder, which ends with the process that holds it.

    It is an flock on a file, and not the existence of a file: that would remain after a kill, and
    refuse the resume that it should protect.

    Parameters
    ----------
    folder : Path
        The folder, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._file: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock; a file system without locks is a warning in the log.

        Raises
        ------
        ColearnError
            If another run holds it; the error names that run.
        OSError
            If the lock's file cannot be written.
        """
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if self._lock(file):
                os.ftruncate(file, 0)
                os.write(file, _me().encode())
                self._file = file
                _HELD.add(self)
        finally:
            if self._file != file:
                os.close(file)

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            _HELD.discard(self)

    def _lock(self, file: int) -> bool:
        """Return whether the lock could be taken, or raise if somebody else holds it."""
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                holder = os.read(file, 300).decode(errors="replace") or "another process"
                raise ColearnError(
                    f"checkpoints: expected a folder that no other run uses, found that "
                    f"{self._path.parent} is used by {holder}; stop that run, or use another folder"
                ) from None
            log(
                WARNING,
                "Checkpoints: %s cannot be locked (%s): make sure that only one run uses it",
                self._path.parent,
                error,
            )
            return False
        return True


def _me() -> str:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since}"


_HELD: set[FolderLock] = set()


def _leave_to_parent() -> None:
    # A forked process, such as one that loads data, shares the lock and could outlive a server that
    # is killed. To close its copy does not end the parent's lock.
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
