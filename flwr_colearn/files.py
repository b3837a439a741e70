"""Files of a run: private, durable, and replaced as a whole."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path
from tempfile import mkstemp
from typing import IO, Any

from flwr.common import log

PRIVATE = 0o600
"""The mode of every file: models and records may be confidential, so only the owner reads them."""

_not_flushed: set[Path] = set()
"""The folders that could not be flushed, of which the log has a warning."""


@contextmanager
def scratch_file(folder: Path, prefix: str) -> Iterator[tuple[IO[bytes], Path]]:
    """Open a new private file whose name no other process uses, and remove it afterwards.

    Parameters
    ----------
    folder : Path
        The folder of the file.
    prefix : str
        The beginning of its name, after a dot; the end is ``.tmp``.

    Yields
    ------
    tuple of file and Path
        A caller that renames the file keeps it.
    """
    handle, name = mkstemp(prefix=f".{prefix}.", suffix=".tmp", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, path
    finally:
        # After an error the half-written file would only take up space.
        remove(path)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it has either the old or the new content."""
    with scratch_file(path.parent, path.name[:100]) as (file, scratch):
        file.write(data)
        flush(file)
        scratch.replace(path)
    flush_folder(path.parent)


def open_private(path: Path, mode: str) -> IO[bytes]:
    """Open an unbuffered binary file, which is created with the mode `PRIVATE`."""
    return open(path, mode, buffering=0, opener=_private)


def append_to(path: Path, data: bytes, durable: bool = False) -> None:
    """Append bytes to a file; if that fails, no part of them stays.

    Raises
    ------
    OSError
        If the bytes could not be written.
    """
    with open_private(path, "ab") as file:
        before = os.fstat(file.fileno()).st_size
        try:
            write_all(file, data)
            if durable:
                os.fsync(file.fileno())
        except OSError:
            # A part of a line would make the next line unreadable too.
            if is_regular(path):
                os.ftruncate(file.fileno(), before)
            raise


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write all bytes to an unbuffered file, which may take fewer at a time."""
    written = 0
    while written < len(data):
        written += file.write(data[written:])


def is_regular(path: Path) -> bool:
    """Return whether a path is a regular file, and not a device such as /dev/stdout."""
    return stat.S_ISREG(path.stat().st_mode)


def set_aside(path: Path) -> Path | None:
    """Rename a file that has content to the first free name ``path.1``, ``path.2``, ...

    Returns
    -------
    Path or None
        The new name; None if there was nothing to rename.
    """
    if not path.exists() or not is_regular(path) or path.stat().st_size == 0:
        return None
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{number}")):
        number += 1
    path.rename(aside)
    return aside


def flush(file: IO[Any]) -> None:
    """Return when the content of a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Return when the entries of a folder are on the disk, where its file system can do that."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        # CIFS and some FUSE file systems refuse it. The files themselves are on the disk.
        if path not in _not_flushed:
            _not_flushed.add(path)
            log(
                WARNING,
                "Files: the folder %s cannot be flushed to the disk (%s): the newest file in it "
                "may be missing after a power cut",
                path,
                error,
            )


def remove(path: Path) -> None:
    """Remove a file if it exists; a failure is a warning in the log."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log(WARNING, "Files: %s could not be removed: %s", path, error)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE)
