"""EpochFile: a round's training after its last finished local epoch, on a participant's disk."""

import hashlib
import json
from collections.abc import Callable, Mapping
from logging import INFO, WARNING
from pathlib import Path
from typing import IO, Any

import numpy as np
from flwr.common import log
from numpy.lib import format as npy

from .errors import expected
from .files import flush, flush_folder, remove, scratch_file
from .roles import Arrays, NDArray
from .site_files import remove_old

Save = Callable[[], Mapping[str, NDArray]]
Load = Callable[[dict[str, NDArray]], Any]

_DIGEST = hashlib.sha256
_CHUNK = 1 << 20


class EpochFile:
    """The file from which a participant that was interrupted goes on with a round.

    The file has a line of JSON, with the key, the epoch and the names of the arrays, then the
    arrays in numpy's format, then the SHA-256 of all of it. It never has Python objects. Only its
    owner may read it. A file that cannot be written or read, or is damaged, costs the epochs of an
    interrupted round and no training: the log has a warning.

    Parameters
    ----------
    path : Path
        The file.
    plan : str
        A description of the round's plan and session. Together with the state at the beginning of
        the round, which includes the received model, it makes the key: a file of another key is of
        another round, and is removed.
    """

    def __init__(self, path: Path, plan: str) -> None:
        self._path = path
        self._plan = plan
        self._key = ""

    def resume(self, save: Save, load: Load) -> int:
        """Load the state after the last finished epoch; return that epoch's number, 0 for none.

        Parameters
        ----------
        save : callable
            Returns the state of the training; called once, for the state at the beginning.
        load : callable
            Restores a state that `save` returned. If it fails, it is called with the state at the
            beginning, and the training begins from there.
        """
        start = {name: array.copy() for name, array in _arrays(save).items()}
        self._key = _key_of(self._plan, start)
        self._remove_scratch()
        kept = self._read()
        if kept is None:
            return 0
        epoch, arrays = kept
        try:
            load(arrays)
        # Anything may be wrong, such as another optimizer, and no attempt may fail for it.
        except Exception as error:
            log(
                WARNING,
                "Local epochs: the round begins from its start, since the state of an earlier "
                "attempt could not be loaded: %r",
                error,
            )
            remove(self._path)
            load(start)
            return 0
        log(INFO, "Local epochs: an interrupted round goes on after its epoch %s", epoch)
        return epoch

    def keep(self, epoch: int, save: Save) -> None:
        """Replace the file by the state after an epoch."""
        arrays = _arrays(save)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Atomic: a process that is killed in the middle leaves the state of the epoch before.
            with scratch_file(self._path.parent, self._scratch) as (file, scratch):
                _write(file, {"key": self._key, "epoch": epoch, "names": list(arrays)}, arrays)
                flush(file)
                scratch.replace(self._path)
            flush_folder(self._path.parent)
            remove_old(self._path)
        except OSError as error:
            log(
                WARNING,
                "Local epochs: not saved, so a restart begins with an earlier epoch: %s; expected "
                "that this participant can write the folder 'state-dir' of its node config",
                error,
            )

    @property
    def _scratch(self) -> str:
        return self._path.name[:100]

    def _remove_scratch(self) -> None:
        """Remove the half-written files that a killed process left."""
        for path in self._path.parent.glob(f".{self._scratch}.*.tmp"):
            remove(path)

    def _read(self) -> tuple[int, dict[str, NDArray]] | None:
        try:
            with self._path.open("rb") as file:
                return self._read_from(file)
        except FileNotFoundError:
            return None
        # ValueError is that of JSON and of numpy's format too.
        except (OSError, ValueError, KeyError, TypeError, MemoryError) as error:
            log(
                WARNING,
                "Local epochs: the round begins from its start, since %s could not be used: %s",
                self._path,
                error,
            )
            return None

    def _read_from(self, file: IO[bytes]) -> tuple[int, dict[str, NDArray]] | None:
        if not _is_sound(file):
            raise ValueError("it is damaged")
        header = json.loads(file.readline())
        if header["key"] != self._key:
            # The round is finished, or the server sends another model for it.
            remove(self._path)
            return None
        arrays = {name: npy.read_array(file, allow_pickle=False) for name in header["names"]}
        return int(header["epoch"]), arrays


def _arrays(save: Save) -> dict[str, NDArray]:
    arrays = {str(name): np.asarray(array) for name, array in save().items()}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise expected(f"'{name}' of the state to save", "an array of numbers", array.dtype)
    return arrays


def _key_of(plan: str, arrays: Arrays) -> str:
    digest = _DIGEST(plan.encode(errors="surrogatepass"))
    for name, array in arrays.items():
        digest.update(repr((name, array.dtype.str, array.shape)).encode(errors="surrogatepass"))
        digest.update(array.tobytes())
    return digest.hexdigest()


def _write(file: IO[bytes], header: dict[str, Any], arrays: Arrays) -> None:
    hashing = _HashingFile(file)
    hashing.write(json.dumps(header).encode() + b"\n")
    for array in arrays.values():
        npy.write_array(hashing, array, allow_pickle=False)
    file.write(hashing.digest.digest())


class _HashingFile:
    """A file that computes the digest of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = _DIGEST()

    def write(self, data: bytes) -> int:
        """Write bytes."""
        self.digest.update(data)
        return self._file.write(data)


def _is_sound(file: IO[bytes]) -> bool:
    """Return whether the digest at the end of a file is that of the rest; go to its beginning."""
    digest, left = _DIGEST(), file.seek(0, 2) - _DIGEST().digest_size
    file.seek(0)
    while left > 0:
        chunk = file.read(min(left, _CHUNK))
        digest.update(chunk)
        left -= len(chunk) or left
    sound = left == 0 and file.read() == digest.digest()
    file.seek(0)
    return sound
