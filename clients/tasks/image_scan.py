"""Which files of a folder are not images: all are decoded once, and the result is kept."""

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

    The result is kept in `root` (``colearn-scan.json``), where that can be written, and holds until
    a file's name, size or time of modification changes.

    Parameters
    ----------
    root : Path
        Folder that holds all of them.
    paths : sequence of str
        Files within it.
    """
    listing = _listing(root, paths)
    known = _kept(root / CACHE, listing)
    if known is None:
        known = _scan(root, paths)
        _keep(root / CACHE, listing, known)
    return {str(root / name): reason for name, reason in known.items()}


def _scan(root: Path, paths: Sequence[str]) -> dict[str, str]:
    # Threads: decoders release the interpreter's lock, and much of the time is the disk's.
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
            # The smallest scale that a JPEG decoder offers: all of the file is read at less cost.
            image.draft(None, (1, 1))
            image.load()
    except Exception as error:  # whatever a decoder makes of a damaged file
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
    except OSError:  # such as a link to nowhere
        return "unreachable"
    return f"{status.st_size} {status.st_mtime_ns}"


def _kept(path: Path, listing: str) -> dict[str, str] | None:
    """Return the result kept for this listing, or None if there is none."""
    try:
        kept = json.loads(path.read_text())
        return dict(kept["unreadable"]) if kept["listing"] == listing else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, listing: str, unreadable: dict[str, str]) -> None:
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        scratch.write_text(json.dumps({"listing": listing, "unreadable": unreadable}, indent=1))
        scratch.replace(path)
    except OSError as error:
        log(WARNING, "%s: not written (%s), so every process checks the images anew", path, error)
