"""The checkpoints of a run: listed, verified, and exported in the formats of frameworks."""

import zipfile
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, CheckpointFolder, UnreadableError, read, round_of
from ..errors import ColearnError
from ..roles import Arrays


def listed(folder: str | Path) -> list[dict[str, Any]]:
    """Return round, name, bytes and time of every checkpoint file, newest round first.

    Raises
    ------
    ColearnError
        If the folder cannot be read, or has none.
    """
    return [
        {
            "round": round_of(path),
            "file": path.name,
            "bytes": path.stat().st_size,
            "written": datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds"),
        }
        for path in _files(folder)
    ]


def verified(folder: str | Path) -> list[dict[str, Any]]:
    """Read every checkpoint file; return for each whether it is sound, and what is wrong with it.

    The records of the rounds, which a checkpoint refers to, are verified with it: a run goes on
    without them, and its history is incomplete then.

    Raises
    ------
    ColearnError
        As `listed`.
    """
    return [_verified(path) for path in _files(folder)]


def _verified(path: Path) -> dict[str, Any]:
    row = {"round": round_of(path), "file": path.name, "sound": False, "arrays": 0, "elements": 0}
    try:
        checkpoint = read(path)
        row["arrays"] = len(checkpoint.arrays)
        row["elements"] = sum(array.size for array in checkpoint.arrays.values())
        lines = CheckpointFolder(path.parent).records(checkpoint)
    except ColearnError as error:
        return {**row, "problem": str(error)}
    complete = len(lines) == checkpoint.records.get("lines", 0)
    problem = "" if complete else "the records of the rounds are missing or damaged"
    return {**row, "sound": complete, "problem": problem}


def export(
    folder: str | Path, output: str | Path, of_round: int | None = None, model: str | None = None
) -> dict[str, Any]:
    """Write the arrays of a checkpoint's shared model to a new file; return file and round.

    Parameters
    ----------
    folder : str or Path
        The folder of the checkpoints.
    output : str or Path
        The file, whose suffix gives the format: see `FORMATS`.
    of_round : int, optional
        The round; by default the newest one that is sound.
    model : str, optional
        For ``.keras``: ``MODULE:FUNCTION``, where the function returns the built Keras model, which
        a checkpoint does not have.

    Raises
    ------
    ColearnError
        If there is no sound checkpoint, the file exists or cannot be written, the format is
        unknown, or what writes it is not installed.
    """
    output = Path(output)
    if output.suffix not in FORMATS:
        raise ColearnError(f"export: expected a file {', '.join(FORMATS)}, found {output}")
    if output.exists():
        raise ColearnError(f"export: expected a new file, found that {output} exists")
    checkpoint = _of_round(Path(folder), of_round)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # A model that is half written must not have the name of a whole one.
        with TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
            written = Path(scratch) / output.name
            FORMATS[output.suffix](checkpoint.arrays, written, model)
            written.replace(output)
    except ColearnError:  # which is a ModuleNotFoundError where an extra is missing
        raise
    except ModuleNotFoundError as error:
        raise ColearnError(
            f"export: expected the module {error.name} to write {output.suffix}, found none; "
            "install it, or use another format"
        ) from error
    except (OSError, TypeError, ValueError) as error:
        raise ColearnError(f"export to {output}: expected to write it, found {error}") from error
    return {"file": str(output), "round": checkpoint.round}


def _of_round(folder: Path, of_round: int | None) -> Checkpoint:
    """Return the newest sound checkpoint of a round, or of all."""
    files = [path for path in _files(folder) if of_round in (None, round_of(path))]
    if not files:
        there = sorted({round_of(path) for path in _files(folder)})
        raise ColearnError(f"checkpoints: expected one of the rounds {there}, found {of_round}")
    newest: list[Checkpoint] = []
    damaged = []
    for path in files:
        if newest and round_of(path) != newest[0].round:
            break
        try:
            newest.append(read(path))
        except UnreadableError:
            raise
        except ColearnError:
            damaged.append(path.name)
    if not newest:
        raise ColearnError(f"checkpoints: expected an undamaged one, found only {damaged}")
    # After a crash there may be two of a round: from its middle, and from its end.
    return max(newest, key=lambda checkpoint: checkpoint.serial)


def _files(folder: str | Path) -> list[Path]:
    try:
        files = CheckpointFolder(folder).files()
    except OSError as error:
        raise ColearnError(f"checkpoints: expected a folder, found {error}") from error
    if not files:
        raise ColearnError(
            f"checkpoints: expected files named round-NNNNNN-DIGEST.npz in {folder}, found none"
        )
    return files


def _npz(arrays: Arrays, path: Path, model: str | None) -> None:
    # np.savez takes names as keywords, of which it has some itself: 'file' would be no array.
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def _safetensors(arrays: Arrays, path: Path, model: str | None) -> None:
    # The format has arrays in the order of C only.
    whole = {name: np.array(array, order="C") for name, array in arrays.items()}
    import_module("safetensors.numpy").save_file(whole, path)


def _state_dict(arrays: Arrays, path: Path, model: str | None) -> None:
    import_module("flwr_colearn.torch").save_state_dict(arrays, path)


def _keras(arrays: Arrays, path: Path, model: str | None) -> None:
    module, _, function = (model or "").partition(":")
    if not function:
        raise ColearnError(
            "export: expected --model MODULE:FUNCTION for .keras, since a checkpoint has arrays "
            f"and no layers, found {model!r}"
        )
    frame = import_module("flwr_colearn.keras")
    try:
        built = getattr(import_module(module), function)()
    except AttributeError as error:
        raise ColearnError(f"export: expected a function {model}, found {error}") from error
    frame.set_arrays(built, arrays)
    built.save(path)


# The writers are looked up by name when they are asked for, so that nothing here needs a framework.
FORMATS: Mapping[str, Callable[[Arrays, Path, str | None], None]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _state_dict,
    ".keras": _keras,
}
"""The writer of each format, by the suffix of the file."""
