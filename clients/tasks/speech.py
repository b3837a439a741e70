"""The task Speech Commands: one-second clips of single words, as log-mel spectrograms.

The files are ``SpeechCommands/<word>/<speaker>_nohash_<n>.wav``, as the archive unpacks; version 1
has 30 words and 65,000 clips. Folders whose name begins with ``_`` (background noise) are ignored.
"""

import hashlib
import json
import re
import warnings
from functools import cache, partial
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.common import log
from scipy.io import wavfile
from tqdm import tqdm

from clients.data import Examples, Task
from clients.metrics import validation_and_test
from clients.objective import CLASSES, Objective
from clients.settings import ParticipantSettings
from clients.tasks import spectrogram
from clients.tasks.array_cache import cache_places, cached_arrays
from clients.tasks.own_data import agreed_classes, numbered_classes
from clients.trainer import NDArray
from flwr_colearn import ColearnError

FOLDER = "SpeechCommands"
MEAN, STD = -6.1, 4.5
"""The mean and deviation of the data set's log-mel values, with which inputs are standardised.

They are constants, so that no site needs the statistics of another site's data.
"""

MAX_NUM_WAVS_PER_CLASS = 2**27 - 1
"""The constant of the data set's own splitting function, by its name there."""


@cache
def load(data_dir: str, split: str, classes: tuple[str, ...] = ()) -> Task:
    """Return the task; inputs are log-mel spectrograms [98, 40, 1] of `clients.tasks.spectrogram`.

    The server's test set is the validation set followed by the test set; ``accuracy`` is measured
    on the latter, ``validation-accuracy`` on the former. Files that are no 16 kHz, mono, 16-bit WAV
    are left out; the log lists them. Spectrograms are cached in ``log-mel.npz`` in the folder, or
    in the user's cache if the folder is not writable, until a file changes.

    Parameters
    ----------
    data_dir : str
        The folder ``SpeechCommands``, or the folder that holds it.
    split : {"official", "speaker"}
        The data set's own parts (`which_set`), or parts of our own (`speaker_set`) for subsets of
        the data whose words do not have all official parts.
    classes : tuple of str
        The words in the order of their numbers; by default those of the folders, sorted.

    Raises
    ------
    ColearnError
        If `split` is unknown, there are no clips, or a part has none.
    """
    if split not in SPLITS:
        raise ColearnError(f"run config 'split': expected {' or '.join(SPLITS)}, found {split!r}")
    folder, names = _listing(data_dir)
    # The classes are those of all files, so that an unreadable clip does not renumber the words.
    words = classes or tuple(sorted({_word(name) for name in names}))
    clips, kept = _clips(folder, names, words)
    places = _parts(kept, split, folder)
    order = _training_order(places)
    held_out = np.concatenate([places["validation"], places["testing"]])
    metrics = partial(
        validation_and_test, validation=len(places["validation"]), test=len(places["testing"])
    )
    return Task(
        clips.take(order),
        clips.take(held_out),
        Objective(metrics=metrics),
        {"num_classes": len(words)},
        own_objective=CLASSES,
    )


@cache
def training_speakers(data_dir: str, split: str) -> tuple[str, ...]:
    """Return the speaker of every clip of the training set, in the order of `load`.

    Raises
    ------
    ColearnError
        As `load`.
    """
    folder, names = _listing(data_dir)
    kept = _prepared(folder, names)["names"].tolist()
    order = _training_order(_parts(kept, split, folder))
    return tuple(speaker(kept[index].partition("/")[2]) for index in order)


def _training_order(places: dict[str, NDArray]) -> NDArray:
    return np.random.default_rng(0).permutation(places["training"])


def definition(settings: ParticipantSettings) -> Task:
    """Return the task without data, with the words that the run config's `classes` names.

    Raises
    ------
    ColearnError
        If it names none.
    """
    shape = (0, spectrogram.FRAMES, spectrogram.BINS, 1)
    none = Examples(np.empty(shape, np.float32), np.empty(0, np.int64))
    return Task(none, model_options={"num_classes": len(agreed_classes(settings))})


def read(settings: ParticipantSettings, folder: Path, part: str) -> Examples | None:
    """Return a site's own clips; None if the folder has no such part.

    Training clips are ``WORD/*.wav`` in the folder, in ``train``, or in ``SpeechCommands``; test
    clips ``test/WORD/*.wav``. The parts of the data set's own split are for simulations: a site
    with few speakers would have none in some part.

    Raises
    ------
    ColearnError
        If a word is not one of the run config's, or no clip is readable.
    """
    names = ("train", FOLDER, ".") if part == "train" else ("test",)
    place = next((folder / name for name in names if (folder / name).is_dir()), None)
    if place is None:
        return None
    place, files = _listing(str(place))
    own = {name: stamp for name, stamp in files.items() if _word(name) != "test"}
    clips, _ = _clips(place, own, agreed_classes(settings))
    if not len(clips):
        raise ColearnError(f"{place}: expected readable clips, found none")
    return clips


def _clips(
    folder: Path, names: dict[str, tuple[int, int]], words: tuple[str, ...]
) -> tuple[Examples, list[str]]:
    """Return the readable clips of a folder and their names."""
    numbers = numbered_classes({_word(name) for name in names}, words, folder)
    arrays = _prepared(folder, names)
    _warn(folder, arrays["faults"].tolist(), len(names))
    kept = arrays["names"].tolist()
    labels = np.array([numbers[_word(name)] for name in kept], np.int64)
    return Examples(arrays["inputs"], labels), kept


def _word(name: str) -> str:
    return name.partition("/")[0]


def _warn(folder: Path, faults: list[str], total: int) -> None:
    if faults:
        shown = "\n".join(faults)
        log(WARNING, "%s: %d of %d clips are left out:\n%s", folder, len(faults), total, shown)


def which_set(name: str) -> str:
    """Return the official part of a clip by its file name: "training", "validation" or "testing".

    The part depends on the SHA-1 of the name up to ``_nohash_``, so that a speaker's clips stay
    together: 10 % validation, 10 % testing.
    """
    # The data set's own function, step by step: any other rounding would move clips.
    digest = int(hashlib.sha1(speaker(name).encode(), usedforsecurity=False).hexdigest(), 16)
    percentage = (digest % (MAX_NUM_WAVS_PER_CLASS + 1)) * (100.0 / MAX_NUM_WAVS_PER_CLASS)
    if percentage < 10:
        return "validation"
    return "testing" if percentage < 20 else "training"


def speaker_set(name: str) -> str:
    """Return our own part of a clip: also by speaker, 10 % validation, 10 % testing."""
    remainder = int(hashlib.sha256(speaker(name).encode()).hexdigest(), 16) % 10
    return {0: "validation", 1: "testing"}.get(remainder, "training")


def speaker(name: str) -> str:
    """Return the speaker of a clip: its file name up to ``_nohash_``."""
    return re.sub(r"_nohash_.*$", "", name)


SPLITS = {"official": which_set, "speaker": speaker_set}


def _parts(names: list[str], split: str, folder: Path) -> dict[str, NDArray]:
    """Return the indices of each part's clips."""
    parts = np.array([SPLITS[split](name.partition("/")[2]) for name in names])
    places = {part: np.flatnonzero(parts == part) for part in ("training", "validation", "testing")}
    if not all(map(len, places.values())):
        found = ", ".join(f"{len(indices)} {part}" for part, indices in places.items())
        raise ColearnError(
            f"{folder}: expected clips in every part of split '{split}', found {found}; set run "
            f"config 'split' to another of {', '.join(SPLITS)}, or add clips"
        )
    return places


def _listing(data_dir: str) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Return the folder, and size and modification time of its clips by ``word/file``."""
    folder = Path(data_dir) / FOLDER
    if not folder.is_dir():
        folder = Path(data_dir)
    names = {}
    for path in sorted(folder.glob("[!_.]*/*.wav")):
        stat = path.stat() if path.exists() else path.lstat()  # a broken link has no stat()
        names[f"{path.parent.name}/{path.name}"] = (stat.st_size, stat.st_mtime_ns)
    if not names:
        raise ColearnError(
            f"run config 'data-dir': expected a folder that holds {FOLDER}/<word>/*.wav, found no "
            f"such file in {data_dir!r}; unpack speech_commands_v0.01.tar.gz there"
        )
    return folder, names


def _prepared(folder: Path, names: dict[str, tuple[int, int]]) -> dict[str, NDArray]:
    """Return the arrays inputs [N, 98, 40, 1] and names [N], and the faults of other files."""
    # The key covers every constant of the spectrograms: after a change the cache is out of date.
    parameters = {name: value for name, value in vars(spectrogram).items() if name.isupper()} | {
        "mean": MEAN,
        "std": STD,
    }
    key = hashlib.sha256(json.dumps([parameters, names]).encode()).hexdigest()
    return cached_arrays(
        cache_places(folder, "log-mel"), key, lambda: _prepare(folder, list(names))
    )


def _prepare(folder: Path, names: list[str]) -> dict[str, NDArray]:
    inputs = np.empty((len(names), spectrogram.FRAMES, spectrogram.BINS, 1), np.float32)
    kept: list[str] = []
    faults = []
    # disable=None: tqdm shows no bar unless stderr is a terminal.
    for name in tqdm(names, desc="log-mel", disable=None, leave=False):
        try:
            clip = read_clip(folder / name)
        except ColearnError as error:
            faults.append(str(error))
            continue
        inputs[len(kept)] = (spectrogram.log_mel(clip) - np.float32(MEAN)) / np.float32(STD)
        kept.append(name)
    return {
        "inputs": inputs[: len(kept)],
        "names": np.array(kept, str),
        "faults": np.array(faults, str),
    }


def read_clip(path: Path) -> NDArray:
    """Return a WAV file as int16 [16000]: cut to one second, or padded with zeros.

    Raises
    ------
    ColearnError
        If it cannot be read, is empty, or is not 16 kHz, mono, 16 bits.
    """
    try:
        with warnings.catch_warnings():
            # scipy warns of chunks without sound, which are harmless, and also of a file that ends
            # early, which is damaged.
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)
            rate, samples = wavfile.read(path)
    except Exception as error:  # a damaged header makes scipy raise errors of many types
        raise ColearnError(
            f"{path}: expected a WAV file that scipy reads, found {error!r}"
        ) from error
    if (rate, samples.dtype, samples.ndim) != (spectrogram.RATE, np.int16, 1) or not len(samples):
        raise ColearnError(
            f"{path}: expected 16000 Hz, int16, one channel, found {rate} Hz, {samples.dtype}, "
            f"samples {list(samples.shape)}"
        )
    clip = np.zeros(spectrogram.RATE, np.int16)
    clip[: len(samples)] = samples[: spectrogram.RATE]
    return clip
