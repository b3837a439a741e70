"""Checkpoints: one file per round, written atomically, verified when read, without pickle."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from typing import IO, Any

import numpy as np
from flwr.common import log

from .errors import ColearnError, whole_number
from .roles import Arrays, NDArray, Role

_NAME = re.compile(r"round-(\d{6,})-([0-9a-f]{16})\.npz")
_STATE = "state"
_NODES = "nodes.json"


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
    """

    round: int
    arrays: Arrays
    state: dict[str, Any]
    extra: Arrays = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of one run.

    A checkpoint is an ``.npz`` file: the model's arrays under ``array-0``, ``array-1``, ...,
    further ones under ``extra-0``, ... and the state as JSON under ``state``. It is written to a
    temporary file, flushed to the disk and renamed, so a file with a checkpoint's name is always
    complete. The name has the first 16 digits of the file's SHA-256, by which damage is detected.

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

    def save(self, checkpoint: Checkpoint) -> Path | None:
        """Write a checkpoint and remove those that are too old.

        Returns
        -------
        Path or None
            ``None`` if the checkpoint could not be written, for example because the disk is full.
            The log contains a warning then, and the older checkpoints stay.
        """
        scratch = self.path / f".round-{checkpoint.round:06d}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(scratch, checkpoint)
            # The digest is of the file and not of the arrays, so it covers the zip's structure too.
            target = self.path / f"round-{checkpoint.round:06d}-{_digest(scratch)}.npz"
            scratch.replace(target)
            # The rename itself is durable only when the folder's entry is on the disk.
            _flush_folder(self.path)
            # Checkpoints of later rounds are damaged: the run would have resumed from them.
            kept = [path for path in self._files() if _round_of(path) <= checkpoint.round]
            for old in set(self._files()) - set(kept[: self.keep]):
                old.unlink()
        except OSError as error:
            # A long run must not end because a disk is full: only the newest checkpoint is missing.
            log(WARNING, "Checkpoint of round %s not written: %s", checkpoint.round, error)
            _remove(scratch)
            return None
        return target

    def note_nodes(self, server_round: int, nodes: list[int]) -> None:
        """Save the ids of the nodes to which a round is about to be sent, replacing older ones."""
        scratch = self.path / f".{_NODES}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with scratch.open("w") as file:
                json.dump({"round": server_round, "nodes": nodes}, file)
                _flush(file)
            scratch.replace(self.path / _NODES)
        except OSError as error:
            log(WARNING, "Nodes of round %s not saved: %s", server_round, error)
            _remove(scratch)

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
            If there are checkpoints and all of them are damaged.
        """
        damaged = []
        for path in self._files():
            try:
                checkpoint = read(path)
            except ColearnError as error:
                log(WARNING, "%s; the one before it is used", error)
                damaged.append(path.name)
            else:
                log(INFO, "Checkpoint: %s", path)
                return checkpoint
        # A new run in the same folder would remove the damaged files, so the user has to decide.
        if damaged:
            raise ColearnError(
                f"checkpoints in {self.path}: expected an undamaged one, found only {damaged}; "
                "move them away to start a new run"
            )
        return None

    def _files(self) -> list[Path]:
        """Return the checkpoint files, newest first."""
        if not self.path.is_dir():
            return []
        files = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(files, key=lambda path: (_round_of(path), path.stat().st_mtime), reverse=True)


def as_folder(value: str | Path | CheckpointFolder | None) -> CheckpointFolder | None:
    """Return `value` as a `CheckpointFolder`, and None as None."""
    return CheckpointFolder(value) if isinstance(value, str | Path) else value


def read(path: str | Path) -> Checkpoint:
    """Read one checkpoint file, verifying its digest first.

    Raises
    ------
    ColearnError
        If the file is missing, damaged, or not a checkpoint.
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
            # Checkpoints of older versions have no "extra-names".
            names, extra_names = state.pop("names"), state.pop("extra-names", [])
            arrays = {name: file[f"array-{index}"] for index, name in enumerate(names)}
            extra = {name: file[f"extra-{index}"] for index, name in enumerate(extra_names)}
        return Checkpoint(int(match[1]), arrays, state, extra)
    except Exception as error:  # zipfile, numpy and json raise many types for damaged data
        raise ColearnError(
            f"checkpoint {path}: expected an undamaged file, found {error or type(error).__name__}"
        ) from None


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


def _write(path: Path, checkpoint: Checkpoint) -> None:
    # Names of arrays may hold any character, and names in a zip file may not: so they go into the
    # state, and the members of the file are numbered.
    names = {"names": list(checkpoint.arrays), "extra-names": list(checkpoint.extra)}
    state = json.dumps({**checkpoint.state, **names})
    members: dict[str, NDArray] = {
        f"{kind}-{index}": array
        for kind, arrays in (("array", checkpoint.arrays), ("extra", checkpoint.extra))
        for index, array in enumerate(arrays.values())
    }
    members[_STATE] = np.frombuffer(state.encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, **members)  # type: ignore[arg-type]  # members are named, not flags
        _flush(file)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _round_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        log(WARNING, "%s could not be removed", path)
