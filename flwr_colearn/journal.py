"""Journal: the records of a run in an append-only file, to whose beginning a checkpoint refers."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import open_private, write_all


class Journal:
    """The lines of a run in an append-only file.

    A checkpoint holds the length and the digest of the lines up to its round, and not the lines:
    else it would grow with every round. Lines after those of the checkpoint that a run resumes from
    are overwritten, since their rounds are run again.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clear()

    def clear(self) -> None:
        """Begin with no lines; the first line that is written replaces those in the file."""
        self._count, self._size, self._digest = 0, 0, hashlib.sha256()

    def extend(self, lines: Sequence[str]) -> dict[str, Any]:
        """Write the lines that are not in the file yet, and return the reference to all of them.

        Parameters
        ----------
        lines : sequence of str
            All lines of the run so far.

        Raises
        ------
        OSError
            If they could not be written; the next call writes them too.
        """
        new = joined(lines[self._count :])
        if new:
            self._append(new, lines)
            self._digest.update(new)
            self._count, self._size = len(lines), self._size + len(new)
        return {"lines": self._count, "bytes": self._size, "sha256": self._digest.hexdigest()}

    def restore(
        self, reference: Mapping[str, Any], copies: Iterable[Path] = ()
    ) -> list[str] | None:
        """Return the lines of a reference; None if no file holds them any more.

        Parameters
        ----------
        reference : mapping
            What `extend` returned.
        copies : iterable of Path
            Other files that should begin with the same lines, if this one does not.

        Raises
        ------
        OSError
            If a file exists and cannot be read.
        """
        self.clear()
        for path in (self.path, *copies):
            data = path.read_bytes()[: reference["bytes"]] if path.is_file() else b""
            digest = hashlib.sha256(data)
            if len(data) == reference["bytes"] and digest.hexdigest() == reference["sha256"]:
                lines = data.decode().split("\n")[:-1]
                # Of a copy the lines are not in this file yet.
                if path == self.path:
                    self._count, self._size, self._digest = len(lines), len(data), digest
                return lines
        return None

    def _append(self, new: bytes, lines: Sequence[str]) -> None:
        with open_private(self.path, "ab") as file:
            # Somebody may have removed or cut the file since the last round.
            complete = os.fstat(file.fileno()).st_size >= self._size
            # Half a line of a full disk goes, and lines of a run that was killed after them.
            file.truncate(self._size if complete else 0)
            write_all(file, new if complete else joined(lines))
            # Before the checkpoint that refers to them.
            os.fsync(file.fileno())


def joined(lines: Iterable[str]) -> bytes:
    """Return lines as the bytes of a file."""
    return "".join(f"{line}\n" for line in lines).encode()
