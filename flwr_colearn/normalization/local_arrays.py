"""LocalArrays: what a participant keeps of its model between rounds."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.common import log

from ..records import records_of, to_record, view
from ..roles import NDArray

STATE = "normalization"
"""Keys in ``context.state`` begin so."""


@dataclass
class LocalArrays:
    """A participant's arrays before and after the last round that it trained, and of which session.

    The former are for a round that is repeated, by a restart or by a server that resumed: it must
    begin from what it began from the first time.
    """

    session: str = ""
    round: int = 0
    before: dict[str, NDArray] = field(default_factory=dict)
    after: dict[str, NDArray] = field(default_factory=dict)

    def at(self, session: str, server_round: int, training: bool) -> dict[str, NDArray]:
        """Return the arrays to begin a round with (or to evaluate with); empty if there are none.

        What another session left is no part of this one; nor is what was kept in a later round.
        """
        if self.session != session or self.round > server_round:
            return {}
        return self.before if training and self.round == server_round else self.after


def load(context: Context, names: Mapping[str, int], file_name: str) -> LocalArrays:
    """Return what is kept in the context's state or the state folder, if it fits the model.

    Parameters
    ----------
    context : Context
        Its node config may have a ``state-dir``.
    names : mapping
        Of the arrays that stay.
    file_name : str
        Of the participant's file in the state folder.
    """
    record = records_of(context.state, ConfigRecord).get(STATE)
    if record is None:
        arrays = _read(context, file_name)
    else:
        kept = records_of(context.state, ArrayRecord)
        before, after = view(kept[f"{STATE}.before"]), view(kept[f"{STATE}.after"])
        arrays = LocalArrays(str(record["session"]), int(record["round"]), before, after)  # type: ignore[arg-type]
    return arrays if set(names) <= set(arrays.after) else LocalArrays()


def save(context: Context, arrays: LocalArrays, file_name: str) -> None:
    """Keep the arrays in the context's state and, with a ``state-dir``, in a file."""
    context.state[STATE] = ConfigRecord({"session": arrays.session, "round": arrays.round})
    context.state[f"{STATE}.before"] = to_record(arrays.before)
    context.state[f"{STATE}.after"] = to_record(arrays.after)
    path = _path(context, file_name)
    if path is None:
        return
    content = io.BytesIO()
    named = {f"before/{name}": array for name, array in arrays.before.items()}
    named |= {f"after/{name}": array for name, array in arrays.after.items()}
    header = {"round": np.asarray(arrays.round), "session": np.asarray(arrays.session)}
    np.savez(content, **header, **named)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(content.getvalue())
    scratch.replace(path)


def is_lasting(context: Context) -> bool:
    """Return whether what is kept outlives the SuperNode."""
    return bool(context.node_config.get("state-dir"))


def _read(context: Context, file_name: str) -> LocalArrays:
    path = _path(context, file_name)
    if path is None or not path.exists():
        return LocalArrays()
    try:
        with np.load(path) as file:
            split: dict[str, dict[str, NDArray]] = {"before": {}, "after": {}}
            for key in file.files:
                half, _, name = key.partition("/")
                if name:
                    split[half][name] = file[key]
            return LocalArrays(str(file["session"]), int(file["round"]), **split)
    except Exception as error:  # whatever is in a damaged file, the shared model's arrays are there
        log(WARNING, "Normalization: %s is unusable: %s", path, error)
        return LocalArrays()


def _path(context: Context, file_name: str) -> Path | None:
    """Return the file of this participant's arrays, or None without a ``state-dir``."""
    folder = context.node_config.get("state-dir")
    if not folder:
        return None
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in file_name)
    return Path(str(folder)) / f"normalization-{safe}.npz"
