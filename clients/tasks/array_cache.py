"""A file cache for prepared arrays, beside their data or in the user's cache folder."""

import hashlib
import os
from collections.abc import Callable, Sequence
from logging import WARNING
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from flwr.common import log

from clients.trainer import NDArray

_KEY = "cache-key"


def cache_places(folder: Path, name: str) -> list[Path]:
    """Return the cache files for arrays made from a folder: in it, and in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flwr-colearn"
    # The user's cache holds the arrays of many folders, so its file names need the folder's path.
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / f"{name}.npz", user / f"{name}-{digest}.npz"]


def cached_arrays(
    places: Sequence[Path], key: str, make: Callable[[], dict[str, NDArray]]
) -> dict[str, NDArray]:
    """Return the arrays cached under this key, or make them and cache them.

    Parameters
    ----------
    places : sequence of Path
        The files to read; the arrays are written to the first one that is writable.
    key : str
        The description of what the arrays were made from. A file with another key is out of date.
    make : callable
        The function that returns the arrays by name, none of them of objects.
    """
    for place in places:
        arrays = _read(place, key)
        if arrays is not None:
            return arrays
    arrays = make()
    # Data folders are often read-only, which is no reason to fail: the next place is tried.
    failures = []
    for place in places:
        try:
            _write(place, key, arrays)
            return arrays
        except OSError as error:
            failures.append(f"{place}: {error}")
    log(WARNING, "Prepared data is not cached for the next run: %s", "; ".join(failures))
    return arrays


def _read(place: Path, key: str) -> dict[str, NDArray] | None:
    try:
        # No pickles: another user may have written the file, and unpickling runs any code.
        with np.load(place, allow_pickle=False) as file:
            if str(file[_KEY]) != key:
                return None
            return {name: file[name] for name in file.files if name != _KEY}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        log(WARNING, "%s cannot be read and is prepared again: %s", place, error)
        return None


def _write(place: Path, key: str, arrays: dict[str, NDArray]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Written to a file of its own name and then renamed, which is atomic: other processes that
    # prepare or read the same arrays never see a part of a file.
    scratch = place.with_name(f".{place.name}.{uuid4().hex}")
    try:
        with scratch.open("wb") as file:
            np.savez(file, **{_KEY: np.array(key)}, **arrays)  # type: ignore[arg-type]
        scratch.replace(place)
    finally:
        scratch.unlink(missing_ok=True)
