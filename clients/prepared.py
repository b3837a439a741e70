"""Arrays that take long to make, kept on disk."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common import log

from clients.data import NDArray

Arrays = dict[str, NDArray]


def prepared(
    name: str,
    sources: Sequence[Path],
    parameters: Mapping[str, Any],
    make: Callable[[], Arrays],
) -> Arrays:
    """Return what `make` returns, from disk if it was made before from the same files.

    Parameters
    ----------
    name : str
        First part of the file's name.
    sources : sequence of Path
        What the arrays are made from: they are made anew if name, size or time of change of one
        differs.
    parameters : mapping
        What else they depend on, as JSON has it.
    make : callable
        Returns arrays by name.

    Notes
    -----
    The file, ``NAME-KEY.npz``, lies beside the first source, or in ``~/.cache/flwr-colearn`` (in
    ``$XDG_CACHE_HOME/flwr-colearn`` where that is set) if that folder cannot be written to. It
    may be removed at any time.
    """
    file = f"{name}-{_key(sources, parameters)}.npz"
    for folder in _folders(sources[0]):
        arrays = _read(folder / file)
        if arrays is not None:
            return arrays
    arrays = make()
    for folder in _folders(sources[0]):
        if _written(arrays, folder / file):
            return arrays
    log(WARNING, "%s: no folder to keep the prepared data in; they are made anew next time", name)
    return arrays


def _key(sources: Sequence[Path], parameters: Mapping[str, Any]) -> str:
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    content = json.dumps([files, dict(parameters)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _folders(source: Path) -> Iterator[Path]:
    yield source.parent
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flwr-colearn"


def _read(path: Path) -> Arrays | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        log(WARNING, "%s: cannot be read (%s); made anew", path, error)
        return None


def _written(arrays: Arrays, path: Path) -> bool:
    # Renamed when complete: several participants may write, and read, at the same time.
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        return False
    return True
