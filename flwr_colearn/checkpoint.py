"""Checkpoints: one file a round, written atomically, verified when read, no pickle."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from typing import IO, Any

import numpy as np
from flwr.common import log

from .errors import ColearnError, whole_number
from .roles import Arrays, NDArray

_NAME = re.compile(r"round-(\d{6,})-([0-9a-f]{16})\.npz")
_STATE = "state"
_NODES = "nodes.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after a completed round.

    Attributes
    ----------
    round : int
        The last completed round; 0 before the first.
    arrays : mapping of str to numpy.ndarray
        The shared model.
    state : dict
        All else that the run needs to go on, as JSON can hold it.
    extra : mapping of str to numpy.ndarray
        Further arrays that the run needs, such as momentum.
    """

    round: int
    arrays: Arrays
    state: dict[str, Any]
    extra: Arrays = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of one run.

    A checkpoint is an ``.npz`` file: the model's arrays under ``array-0``, ``array-1``, ...,
    further ones under ``extra-0``, ... and the state as JSON under ``state``. It is written aside,
    flushed to the disk and renamed, so there is never half a checkpoint under its name, and the
    name carries the first 16 digits of the file's SHA-256, so a damaged one is found out.

    Parameters
    ----------
    path : str or Path
        Made when first needed.
    keep : int, default 3
        So many of the newest are kept.

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
            ``None`` if it could not be written (a full disk, say): the log says so, and the run
            goes on with the older ones.
        """
        scratch = self.path / f".round-{checkpoint.round:06d}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(scratch, checkpoint)
            target = self.path / f"round-{checkpoint.round:06d}-{_digest(scratch)}.npz"
            scratch.replace(target)
            _flush_folder(self.path)
            # Those of later rounds were found to be damaged, or this run would be past them.
            kept = [path for path in self._files() if _round_of(path) <= checkpoint.round]
            for old in set(self._files()) - set(kept[: self.keep]):
                old.unlink()
        except OSError as error:
            log(WARNING, "Checkpoint of round %s not written: %s", checkpoint.round, error)
            _remove(scratch)
            return None
        return target

    def note_nodes(self, server_round: int, nodes: list[int]) -> None:
        """Write down to which nodes a round is about to be sent; until the next such note."""
        scratch = self.path / f".{_NODES}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with scratch.open("w") as file:
                json.dump({"round": server_round, "nodes": nodes}, file)
                _flush(file)
            scratch.replace(self.path / _NODES)
        except OSError as error:
            log(WARNING, "Nodes of round %s not written down: %s", server_round, error)
            _remove(scratch)

    def noted_nodes(self, server_round: int) -> list[int]:
        """Return the nodes noted for a round; none if none, or others, were."""
        try:
            noted = json.loads((self.path / _NODES).read_text())
            return [int(node) for node in noted["nodes"]] if noted["round"] == server_round else []
        except (OSError, ValueError, KeyError, TypeError):  # no note, or a damaged one
            return []

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is undamaged, or None if there is none at all.

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
        if damaged:
            raise ColearnError(
                f"checkpoints in {self.path}: expected an undamaged one, found only {damaged}; "
                "move them away to begin anew"
            )
        return None

    def _files(self) -> list[Path]:
        """Return the checkpoint files, newest first."""
        if not self.path.is_dir():
            return []
        files = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(files, key=lambda path: (_round_of(path), path.stat().st_mtime), reverse=True)


def as_folder(value: str | Path | CheckpointFolder | None) -> CheckpointFolder | None:
    """Return `value` as a folder of checkpoints; None stays None."""
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
            names, extra_names = state.pop("names"), state.pop("extra-names", [])
            arrays = {name: file[f"array-{index}"] for index, name in enumerate(names)}
            extra = {name: file[f"extra-{index}"] for index, name in enumerate(extra_names)}
        return Checkpoint(int(match[1]), arrays, state, extra)
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ColearnError(
            f"checkpoint {path}: expected an undamaged file, found {error or type(error).__name__}"
        ) from None


def check_same_configuration(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raise a ColearnError that names what differs between two configurations."""
    for key in {**saved, **current}:
        if saved.get(key) != current.get(key):
            raise ColearnError(
                f"checkpoint: expected one of the same configuration, found another {key}: "
                f"{saved.get(key)} there, {current.get(key)} now; use another folder, or the old "
                "configuration"
            )


def describe_arrays(arrays: Arrays) -> str:
    """Return a short text that differs for models of different names, shapes or types."""
    signature = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    digest = hashlib.sha256(repr(signature).encode()).hexdigest()[:8]
    return (
        f"{len(arrays)} arrays of {sum(array.size for array in arrays.values())} elements, {digest}"
    )


def _write(path: Path, checkpoint: Checkpoint) -> None:
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
