"""A scan of a folder for files that are not readable images, with a cached result."""

import hashlib
import json
import os
from collections.abc import Sequence
from logging import WARNING
from multiprocessing.pool import ThreadPool
from pathlib import Path

from flwr.common import log
from tqdm import tqdm

CACHE = "colearn-scan.json"


def unreadable_images(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """Return the files that are not readable images, each with the reason.

    Every file is decoded once. The result is cached in ``colearn-scan.json`` in `root`, where that
    is writable, and is valid until a file's name, size or time of modification changes.

    Parameters
    ----------
    root : Path
        The folder that holds all of the files.
    paths : sequence of str
        The paths of the files.
    """
    listing = _listing(root, paths)
    known = _kept(root / CACHE, listing)
    if known is None:
        known = _scan(root, paths)
        _keep(root / CACHE, listing, known)
    return {str(root / name): reason for name, reason in known.items()}


def _scan(root: Path, paths: Sequence[str]) -> dict[str, str]:
    # Threads are enough: decoders release the interpreter lock, and disks take much of the time.
    with ThreadPool() as pool:
        reasons = pool.imap(_why_unreadable, paths, chunksize=64)
        bar = tqdm(reasons, desc=f"checking {root}", total=len(paths), unit="file", disable=None)
        return {
            os.path.relpath(path, root): reason
            for path, reason in zip(paths, bar, strict=True)
            if reason
        }


def _why_unreadable(path: str) -> str:
    """Return why a file is no readable image, or "" if it is one."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            # The smallest scale that a JPEG decoder offers: the file is read to its end, so that a
            # truncated one is found, at less cost than in full size.
            image.draft(None, (1, 1))
            image.load()
    except Exception as error:  # decoders raise errors of many types for a damaged file
        return str(error).replace(repr(path), "it") or type(error).__name__
    return ""


def _listing(root: Path, paths: Sequence[str]) -> str:
    """Return a digest of the files' names, sizes and times of modification."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(f"{os.path.relpath(path, root)}\0{_state(path)}\0"))
    return digest.hexdigest()


def _state(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # for example a broken link
        return "unreachable"
    return f"{status.st_size} {status.st_mtime_ns}"


def _kept(path: Path, listing: str) -> dict[str, str] | None:
    """Return the result cached for this listing, or None if there is none."""
    try:
        kept = json.loads(path.read_text())
        return dict(kept["unreadable"]) if kept["listing"] == listing else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, listing: str, unreadable: dict[str, str]) -> None:
    # Renamed when complete: several participants' processes may scan the same folder at once.
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        scratch.write_text(json.dumps({"listing": listing, "unreadable": unreadable}, indent=1))
        scratch.replace(path)
    except OSError as error:
        log(WARNING, "%s: not written (%s), so every process checks the images again", path, error)
