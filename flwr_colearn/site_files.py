"""The names of a participant's files in its folder ``state-dir``, and the removal of old ones."""

import hashlib
import re
from pathlib import Path

from .files import remove

SESSIONS = 3
"""The number of trainings of which a participant keeps files of a kind; older ones are removed."""


def state_path(folder: Path, name: str, session: str, kind: str = "state") -> Path:
    """Return the file of a participant's state in a session.

    Names that differ have files that differ, whatever characters they have, however long they are,
    and also where the file system does not distinguish upper and lower case.

    Parameters
    ----------
    folder : Path
        The folder ``state-dir``.
    name, session : str
        The participant's name and the training's session.
    kind : str
        The ending of the file's name.

    Examples
    --------
    >>> state_path(Path("/srv"), "site 1", "a").name
    'site-1-f39f26e61c6d-ca978112ca1b.state'
    """
    # For a person who looks into the folder; the digests alone distinguish the files.
    shown = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return folder / f"{shown}-{_short(name)}-{_short(session)}.{kind}"


def remove_old(path: Path) -> None:
    """Remove the files of this participant's oldest sessions; `path` is that of the present one."""
    prefix = path.name.rpartition("-")[0]
    others = [p for p in path.parent.glob(f"{prefix}-*{path.suffix}") if p != path]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    for old in others[SESSIONS - 1 :]:
        remove(old)


def _short(text: str) -> str:
    # Text from a node config may hold lone surrogates, which UTF-8 does not have.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
