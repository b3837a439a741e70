"""Arrays that took long to prepare, kept in a file beside their data or in the user's cache."""

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
    """Return where arrays made from a folder's files are kept: there, else in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flwr-colearn"
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / f"{name}.npz", user / f"{name}-{digest}.npz"]


def cached_arrays(
    places: Sequence[Path], key: str, make: Callable[[], dict[str, NDArray]]
) -> dict[str, NDArray]:
    """Return the arrays that were kept under this key, or make them and keep them.

    Parameters
    ----------
    places : sequence of Path
        Files to look in; the arrays are written to the first that can be written.
    key : str
        Says what the arrays were made from. A file with another key is out of date.
    make : callable
        Returns arrays by name, without objects.
    """
    for place in places:
        arrays = _read(place, key)
        if arrays is not None:
            return arrays
    arrays = make()
    failures = []
    for place in places:
        try:
            _write(place, key, arrays)
            return arrays
        except OSError as error:
            failures.append(f"{place}: {error}")
    log(WARNING, "Prepared data is not kept for the next run: %s", "; ".join(failures))
    return arrays


def _read(place: Path, key: str) -> dict[str, NDArray] | None:
    try:
        with np.load(place, allow_pickle=False) as file:
            if str(file[_KEY]) != key:
                return None
            return {name: file[name] for name in file.files if name != _KEY}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        log(WARNING, "%s cannot be read and is prepared anew: %s", place, error)
        return None


def _write(place: Path, key: str, arrays: dict[str, NDArray]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, whatever other processes do at the same time.
    scratch = place.with_name(f".{place.name}.{uuid4().hex}")
    try:
        with scratch.open("wb") as file:
            np.savez(file, **{_KEY: np.array(key)}, **arrays)  # type: ignore[arg-type]
        scratch.replace(place)
    finally:
        scratch.unlink(missing_ok=True)
