"""Checkpoints: one file per round, written atomically, verified when read, without pickle."""

import errno
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from logging import INFO, WARNING
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from flwr.common import log

from .errors import ColearnError, whole_number
from .files import flush, flush_folder, remove, replace_file, scratch_file
from .folder_lock import FolderLock
from .journal import Journal
from .roles import Arrays, NDArray, Role

_NAME = re.compile(r"round-(\d{6,})-([0-9a-f]{16})\.npz")
_STATE = "state"
_NODES, _RECORDS = "nodes.json", "records.jsonl"
_SCRATCH = ".round-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a completed round.

    Attributes
    ----------
    round : int
        The last completed round; 0 before the first.
    arrays : mapping of str to numpy.ndarray
        The shared model.
    state : dict
        The rest of the run's state, in types that JSON has.
    extra : mapping of str to numpy.ndarray
        Further arrays of the run's state, such as momentum.
    serial : int
        The number of the checkpoint among those of its run, by which one from the middle of a round
        precedes the one from its end. `CheckpointFolder` sets it.
    records : mapping
        The reference to the run's records, see `flwr_colearn.journal.Journal`; set likewise.
    """

    round: int
    arrays: Arrays
    state: dict[str, Any]
    extra: Arrays = field(default_factory=dict)
    serial: int = field(default=0, compare=False)
    records: Mapping[str, Any] = field(default_factory=dict, compare=False)


class UnreadableError(ColearnError):
    """Raised for a checkpoint that could not be read at all, which does not mean that it is bad."""


class CheckpointFolder:
    """The checkpoints of one run.

    A checkpoint is an ``.npz`` file: the model's arrays under ``array-0``, ``array-1``, ...,
    further ones under ``extra-0``, ... and the state as JSON under ``state``. It is written to a
    temporary file, flushed to the disk and renamed, so a file with a checkpoint's name is always
    complete. The name has the first 16 digits of the file's SHA-256, by which damage is detected.
    The records of the rounds are in ``records.jsonl``, which only grows, and of which a checkpoint
    holds length and digest. Only the owner may read the files.

    Parameters
    ----------
    path : str or Path
        The folder; created by the first write.
    keep : int, default 3
        The number of checkpoints to keep; older ones are removed.

    Raises
    ------
    ColearnError
        If `keep` is not at least 1.
    """

    def __init__(self, path: str | Path, keep: int = 3) -> None:
        self.path = Path(path)
        self.keep = whole_number("keep of CheckpointFolder", keep, least=1)
        self._lock: FolderLock | None = None
        self._journal = Journal(self.path / _RECORDS)
        self._serial = 0
        # The file that this run wrote or read last, which must not make room for another one.
        self._sound: Path | None = None

    def open(self) -> None:
        """Keep the folder for one run, until `close`, and find out whether it can be written.

        Raises
        ------
        ColearnError
            If another run has opened the folder, or it cannot be written. A full disk is a warning
            in the log, since the run can be resumed and there may be room later.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.path)
            lock.acquire()
            self._lock, self._serial, self._sound = lock, 0, None
            self._journal.clear()
            with TemporaryFile(dir=self.path):
                pass
            # Without the lock another run may be writing one of them.
            if lock.is_held:
                self._remove_scratch()
        except OSError as error:
            if error.errno in _NO_ROOM:
                log(WARNING, "Checkpoints: no room in %s: %s", self.path, error)
                return
            self.close()
            # Now, and not after the first round, which may take a day.
            raise ColearnError(
                f"checkpoints: expected a folder that can be written, found {error}; mend "
                f"{self.path.absolute()}, or use another folder"
            ) from error

    def close(self) -> None:
        """Let another run use the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def save(self, checkpoint: Checkpoint, records: Sequence[str] = ()) -> Path | None:
        """Write a checkpoint and remove those that are too old.

        Where there is room for fewer than `keep` files, the newest are kept.

        Parameters
        ----------
        checkpoint : Checkpoint
            The state of the run.
        records : sequence of str
            The records of all rounds so far, one a line; only new ones are written.

        Returns
        -------
        Path or None
            ``None`` if the checkpoint could not be written, for example because the disk is full.
            The log contains a warning then, and the last checkpoint stays.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            target = self._written(replace(checkpoint, serial=self._serial + 1), records)
        except OSError as error:
            # A long run must not end because a disk is full: only the newest checkpoint is missing.
            log(WARNING, "Checkpoint of round %s not written: %s", checkpoint.round, error)
            return None
        self._serial, self._sound = self._serial + 1, target
        # The rename itself is durable only when the folder's entry is on the disk.
        flush_folder(self.path)
        self._prune(target)
        return target

    def records(self, checkpoint: Checkpoint, copies: Iterable[Path] = ()) -> list[str]:
        """Return the records of the rounds up to a checkpoint, one a line.

        If they are lost, the log has a warning, and there are none: the model is sound all the
        same.

        Parameters
        ----------
        checkpoint : Checkpoint
            What `latest` returned.
        copies : iterable of Path
            Other files that should begin with these records, such as the history's.

        Raises
        ------
        ColearnError
            If a file exists and could not be read.
        """
        if not checkpoint.records:
            return []
        try:
            lines = self._journal.restore(checkpoint.records, copies)
        except OSError as error:
            raise UnreadableError(
                f"records of the run: expected files that can be read, found {error}; try again"
            ) from None
        if lines is None:
            log(
                WARNING,
                "Checkpoints: %s is missing or damaged: the run goes on without the records up to "
                "round %s, and sums in later ones begin there",
                self._journal.path,
                checkpoint.round,
            )
        return lines or []

    def note_nodes(self, server_round: int, nodes: list[int]) -> None:
        """Save the ids of the nodes to which a round is about to be sent, replacing older ones."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            noted = {"round": server_round, "nodes": nodes}
            replace_file(self.path / _NODES, json.dumps(noted).encode())
        except OSError as error:
            log(WARNING, "Nodes of round %s not saved: %s", server_round, error)

    def noted_nodes(self, server_round: int) -> list[int]:
        """Return the nodes that were saved for a round; none if the file is of another round."""
        try:
            noted = json.loads((self.path / _NODES).read_text())
            return [int(node) for node in noted["nodes"]] if noted["round"] == server_round else []
        # The nodes only repeat a random choice, so a missing or damaged file is no reason to stop.
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def latest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None if the folder holds no checkpoints.

        Raises
        ------
        ColearnError
            If there are checkpoints and all of them are damaged, or if the folder or a file that
            may be sound cannot be read.
        """
        try:
            files = self.files()
        except OSError as error:
            raise ColearnError(
                f"checkpoints: expected a folder that can be read, found {error}; mend "
                f"{self.path.absolute()}, or use another folder"
            ) from error
        damaged: list[str] = []
        for _, paths in groupby(files, key=round_of):
            sound = self._sound_ones(paths, damaged)
            if sound:
                # After a crash there may be two of a round: from its middle, and from its end.
                path, checkpoint = max(sound, key=lambda each: each[1].serial)
                log(INFO, "Checkpoint: %s", path)
                self._serial, self._sound = checkpoint.serial, path
                return checkpoint
        # A new run in the same folder would remove the damaged files, so the user has to decide.
        if damaged:
            raise ColearnError(
                f"checkpoints in {self.path}: expected an undamaged one, found only {damaged}; "
                "move them away to start a new run"
            )
        return None

    def _sound_ones(
        self, paths: Iterable[Path], damaged: list[str]
    ) -> list[tuple[Path, Checkpoint]]:
        """Return the undamaged checkpoints; add the names of the others to `damaged`."""
        sound = []
        for path in paths:
            try:
                sound.append((path, read(path)))
            # Not as good as damaged: a run from an older one would remove it later.
            except UnreadableError:
                raise
            except ColearnError as error:
                log(WARNING, "%s; the one before it is used", error)
                damaged.append(path.name)
        return sound

    def _written(self, checkpoint: Checkpoint, records: Sequence[str]) -> Path:
        """Write a checkpoint, if need be in the place of older ones; return its path."""
        while True:
            try:
                reference = self._journal.extend(records)
                return self._write(replace(checkpoint, records=reference))
            except OSError as error:
                old = self._dispensable() if error.errno in _NO_ROOM else None
                if old is None:
                    raise
                log(WARNING, "Checkpoints: %s is removed, to make room for a newer one", old)
                old.unlink()

    def _write(self, checkpoint: Checkpoint) -> Path:
        with scratch_file(self.path, f"{_SCRATCH[1:]}{checkpoint.round:06d}") as (file, scratch):
            _write(file, checkpoint)
            # The digest is of the file and not of the arrays, so it covers the zip's structure too.
            target = self.path / f"round-{checkpoint.round:06d}-{_digest(scratch)}.npz"
            scratch.replace(target)
        return target

    def _dispensable(self) -> Path | None:
        """Return the file of the oldest round, without the one that the run would resume from."""
        files = self.files()
        needed = self._sound or next(iter(files), None)
        return next((path for path in reversed(files) if path != needed), None)

    def _prune(self, newest: Path) -> None:
        """Remove files that are too old; a failure is a warning in the log."""
        try:
            files = self.files()
        except OSError as error:
            log(WARNING, "Checkpoints: old ones not removed: %s", error)
            return
        # Checkpoints of later rounds are damaged: the run would have resumed from them. One of the
        # same round is from its middle.
        earlier = [path for path in files if round_of(path) < round_of(newest)]
        kept = {newest, *earlier[: self.keep - 1]}
        for path in files:
            if path not in kept:
                remove(path)

    def _remove_scratch(self) -> None:
        """Remove the half-written files that a killed run left."""
        for path in self.path.glob(f"{_SCRATCH}*.tmp"):
            remove(path)

    def files(self) -> list[Path]:
        """Return the checkpoint files, damaged ones too, newest round first."""
        try:
            files = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        # By round and not by time, since a clock may be set back.
        return sorted(files, key=lambda path: (round_of(path), path.name), reverse=True)


def as_folder(value: str | Path | CheckpointFolder | None) -> CheckpointFolder | None:
    """Return `value` as a `CheckpointFolder`, and None as None."""
    return CheckpointFolder(value) if isinstance(value, str | Path) else value


def read(path: str | Path) -> Checkpoint:
    """Read one checkpoint file, verifying its digest first.

    Raises
    ------
    UnreadableError
        If the file is missing, or could not be read.
    ColearnError
        If it is damaged, or not a checkpoint.
    """
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ColearnError(
            f"checkpoint: expected a file named round-NNNNNN-DIGEST.npz, found {path.name}"
        )
    try:
        found = _digest(path)
        if found != match[2]:
            raise ValueError(f"its SHA-256 begins with {found}")
        with np.load(path, allow_pickle=False) as file:
            state = json.loads(file[_STATE].tobytes())
            names, extra_names = state.pop("names"), state.pop("extra-names")
            written, serial, records = (state.pop(key) for key in ("round", "serial", "records"))
            arrays = {name: file[f"array-{index}"] for index, name in enumerate(names)}
            extra = {name: file[f"extra-{index}"] for index, name in enumerate(extra_names)}
        if written != int(match[1]):
            raise ValueError(f"the checkpoint of round {written}; was the file renamed?")
        return Checkpoint(written, arrays, state, extra, int(serial), records)
    except (OSError, MemoryError) as error:
        # What zipfile and numpy find in a bad file has no code, or that of an impossible position.
        if isinstance(error, OSError) and error.errno in (None, errno.EINVAL):
            raise _damaged(path, error) from None
        raise UnreadableError(
            f"checkpoint {path}: expected a file that can be read, found "
            f"{str(error) or type(error).__name__}; try again, or move the file away to go on "
            "without it"
        ) from None
    except Exception as error:  # zipfile, numpy and json raise many types for damaged data
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ColearnError:
    return ColearnError(
        f"checkpoint {path}: expected an undamaged file, found {str(error) or type(error).__name__}"
    )


def check_same_configuration(
    saved: Mapping[str, str], current: Mapping[str, str], may_grow: Collection[str] = ()
) -> None:
    """Raise a ColearnError that names every difference between two configurations.

    Parameters
    ----------
    saved, current : mapping of str to str
        The configuration in the checkpoint, and that of the run that is to resume it.
    may_grow : collection of str
        The settings whose number may be larger than the saved one; "None" is no limit.
    """
    differences = [
        f"another {key}: {saved.get(key)} there, {current.get(key)} now"
        for key in {**saved, **current}
        if saved.get(key) != current.get(key)
        and not (key in may_grow and _grows(saved.get(key), current.get(key)))
    ]
    if differences:
        raise ColearnError(
            "checkpoint: expected one of the same configuration, found "
            f"{'; '.join(differences)}; use another folder, or the old configuration"
        )


def _grows(saved: str | None, current: str | None) -> bool:
    if saved is None or not saved.isdecimal():
        return False
    return current == "None" or (str(current).isdecimal() and int(str(current)) > int(saved))


def describe_arrays(arrays: Arrays) -> str:
    """Return a short text that differs for models of different array names, shapes or types."""
    signature = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    digest = hashlib.sha256(repr(signature).encode()).hexdigest()[:8]
    return (
        f"{len(arrays)} arrays of {sum(array.size for array in arrays.values())} elements, {digest}"
    )


def describe_roles(roles: Mapping[str, Role]) -> str:
    """Return a short text that differs for models of which an array has another role.

    Examples
    --------
    >>> describe_roles({"w": Role.TRAINABLE, "b": Role.TRAINABLE, "n": Role.COUNTER})
    '2 trainable, 1 counter (41d9abec)'
    """
    counts = Counter(role.value for role in roles.values())
    digest = hashlib.sha256(repr([(n, r.value) for n, r in roles.items()]).encode()).hexdigest()[:8]
    return f"{', '.join(f'{count} {role}' for role, count in counts.items())} ({digest})"


def _write(file: IO[bytes], checkpoint: Checkpoint) -> None:
    # Names of arrays may hold any character, and names in a zip file may not: so they go into the
    # state, and the members of the file are numbered.
    own = {
        "names": list(checkpoint.arrays),
        "extra-names": list(checkpoint.extra),
        "round": checkpoint.round,
        "serial": checkpoint.serial,
        "records": dict(checkpoint.records),
    }
    state = json.dumps({**checkpoint.state, **own})
    members: dict[str, NDArray] = {
        f"{kind}-{index}": array
        for kind, arrays in (("array", checkpoint.arrays), ("extra", checkpoint.extra))
        for index, array in enumerate(arrays.values())
    }
    members[_STATE] = np.frombuffer(state.encode(), np.uint8)
    np.savez(file, **members)  # type: ignore[arg-type]  # members are named, not flags
    flush(file)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def round_of(path: Path) -> int:
    """Return the round in the name of a checkpoint file."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
