"""The command flwr-colearn checkpoints: what is in a folder, what is damaged, and exports."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from flwr_colearn import CheckpointFolder
from flwr_colearn.checkpoint import Checkpoint
from flwr_colearn.reporting.command_line import main

ARRAYS = {
    "dense/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "file": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "steps": np.array(7, dtype=np.int64),
}


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of rounds 1 to 3, of which round 3 multiplies the arrays by 3."""
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for number in (1, 2, 3):
        arrays = {name: array * number for name, array in ARRAYS.items()}
        lines = [f"{{{each}}}" for each in range(number)]
        checkpoints.save(Checkpoint(number, arrays, {}), lines)
    return checkpoints.path


def answer(capsys, *arguments):
    status = main(["checkpoints", *map(str, arguments)])
    return status, json.loads(capsys.readouterr().out)


def damage(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))


def same(found, factor):
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        # A scalar of numpy's, which 0-d arrays become when multiplied, has no shape to lose.
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array * factor)


def test_the_files_are_listed_newest_first(folder, capsys):
    for arguments in (["--json"], ["list", "--json"]):
        status, rows = answer(capsys, folder, *arguments)
        assert status == 0
        assert [row["round"] for row in rows] == [3, 2, 1]
        assert all((folder / row["file"]).stat().st_size == row["bytes"] for row in rows)
    assert main(["checkpoints", str(folder)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["round", "file", "bytes", "written"]
    assert [row.split()[0] for row in rows] == ["3", "2", "1"]


def test_sound_files_are_verified(folder, capsys):
    status, rows = answer(capsys, folder, "--json", "verify")
    assert status == 0
    assert [(row["sound"], row["arrays"], row["elements"]) for row in rows] == [(True, 3, 13)] * 3


def test_a_damaged_file_is_found_and_named(folder, capsys):
    [newest] = folder.glob("round-000003-*.npz")
    damage(newest)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    status, rows = answer(capsys, folder, "verify", "--json")
    assert status == 1
    assert [row["sound"] for row in rows] == [False, True, True]
    assert "its SHA-256 begins with" in rows[0]["problem"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_records_are_found(folder, capsys):
    (folder / "records.jsonl").write_text("{0}\n{9}\n{2}\n")
    status, rows = answer(capsys, folder, "verify", "--json")
    assert status == 1
    assert [row["sound"] for row in rows] == [False, False, True]
    assert "records of the rounds" in rows[0]["problem"]


def npz(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def safetensors(path):
    # The format orders arrays by type; names decide.
    found = pytest.importorskip("safetensors.numpy").load_file(path)
    return {name: found[name] for name in ARRAYS if name in found}


def state_dict(path):
    torch = pytest.importorskip("torch")
    return {name: value.numpy() for name, value in torch.load(path, weights_only=True).items()}


@pytest.mark.parametrize("reader", [npz, safetensors, state_dict])
def test_an_export_is_read_by_the_format_s_own_library(reader, folder, tmp_path, capsys):
    suffix = {npz: ".npz", safetensors: ".safetensors", state_dict: ".pt"}[reader]
    if reader is not npz:
        pytest.importorskip({safetensors: "safetensors", state_dict: "torch"}[reader])
    for number, arguments in ((3, []), (2, ["--round", 2])):
        path = tmp_path / f"out-{number}" / f"model{suffix}"
        status, done = answer(capsys, folder, "export", path, *arguments, "--json")
        assert (status, done) == (0, {"file": str(path), "round": number})
        same(reader(path), number)
        assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_an_export_as_a_keras_model_predicts_like_the_shared_one(tmp_path, capsys, monkeypatch):
    keras = pytest.importorskip("keras")
    from flwr_colearn.keras import get_arrays

    (tmp_path / "own_models.py").write_text(
        "import keras\n"
        "def net():\n"
        "    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shared = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    folder, path = tmp_path / "checkpoints", tmp_path / "model.keras"
    CheckpointFolder(folder).save(Checkpoint(1, get_arrays(shared), {}))
    answer(capsys, folder, "export", path, "--model", "own_models:net", "--json")
    inputs = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = keras.saving.load_model(path).predict(inputs, verbose=0)
    assert np.array_equal(found, shared.predict(inputs, verbose=0))
    for name in ("own_models:missing", "no_module:net"):
        wrong = ["export", str(tmp_path / "other.keras"), "--model", name]
        assert main(["checkpoints", str(folder), *wrong]) == 2
        assert "expected" in capsys.readouterr().err


def test_the_newest_sound_round_is_exported(folder, tmp_path, capsys):
    [newest] = folder.glob("round-000003-*.npz")
    damage(newest)
    assert answer(capsys, folder, "export", tmp_path / "m.npz", "--json")[1]["round"] == 2
    same(npz(tmp_path / "m.npz"), 2)
    assert (
        main(["checkpoints", str(folder), "export", str(tmp_path / "n.npz"), "--round", "3"]) == 2
    )
    assert "expected an undamaged one" in capsys.readouterr().err
    assert not (tmp_path / "n.npz").exists()


def test_of_two_checkpoints_of_a_round_the_later_is_exported(tmp_path, capsys):
    """The middle of a round and its end; the one that is written last is the end."""
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    first = checkpoints.save(Checkpoint(1, {"w": np.zeros(2)}, {}))
    kept = first.read_bytes()
    checkpoints.save(Checkpoint(1, {"w": np.ones(2)}, {}))
    first.write_bytes(kept)
    answer(capsys, checkpoints.path, "export", tmp_path / "m.npz", "--json")
    assert npz(tmp_path / "m.npz")["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["model.h5"], "expected a file .npz, .safetensors, .pt, .keras, found model.h5"),
        (["model.npz", "--round", "9"], r"expected one of the rounds [1, 2, 3], found 9"),
        (["model.keras"], "expected --model MODULE:FUNCTION for .keras"),
    ],
)
def test_exports_that_are_impossible(arguments, found, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoints", str(folder), "export", *arguments]) == 2
    assert found in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_file_that_exists_is_never_replaced(folder, capsys):
    [newest] = folder.glob("round-000003-*.npz")
    before = newest.read_bytes()
    assert main(["checkpoints", str(folder), "export", str(newest)]) == 2
    assert "expected a new file" in capsys.readouterr().err
    assert newest.read_bytes() == before


@pytest.mark.parametrize("action", ["list", "verify"])
def test_a_folder_without_checkpoints_is_an_error(action, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert main(["checkpoints", str(path), action]) == 2
        assert capsys.readouterr().err.startswith("flwr-colearn: checkpoints: expected")


def test_all_but_frameworks_formats_work_without_any(folder, tmp_path):
    path = tmp_path / "model.npz"
    code = (
        "import sys\n"
        "for name in ('torch', 'tensorflow', 'keras', 'matplotlib', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from flwr_colearn.reporting.command_line import main\n"
        f"folder = {str(folder)!r}\n"
        "assert main(['checkpoints', folder, 'list']) == 0\n"
        "assert main(['checkpoints', folder, 'verify']) == 0\n"
        f"assert main(['checkpoints', folder, 'export', {str(path)!r}]) == 0\n"
        "for suffix in ('pt', 'safetensors'):\n"
        "    assert main(['checkpoints', folder, 'export', folder + '/m.' + suffix]) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert zipfile.ZipFile(path).testzip() is None
    assert "torch" in done.stderr
    assert "safetensors" in done.stderr
