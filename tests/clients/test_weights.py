import pickle

import numpy as np
import pytest
import torch

from clients.weights import read_weights
from flwr_colearn import ColearnError

ARRAYS = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.count": np.array(7, np.int64),
}


def save(path):
    if path.suffix == ".npz":
        np.savez(path, **ARRAYS)
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(ARRAYS, path)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth"])
def test_arrays_come_back_by_name(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    save(path)
    found = read_weights(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


class Evil:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_no_file_runs_code(tmp_path, suffix, capsys):
    path = tmp_path / f"model{suffix}"
    if suffix == ".npz":
        np.savez(path, evil=np.array([Evil()], object))
    else:
        torch.save({"evil": Evil()}, path)
    with pytest.raises(ColearnError, match="'initial-weights': expected a readable file"):
        read_weights(path)
    assert "code of the file ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.onnx", b"", r"expected a file .npz, .safetensors, .pt, .pth, found .*model.onnx"),
        ("model.npz", b"damaged", "expected a readable file of weights"),
        ("model.pt", pickle.dumps(1), "expected a"),
        ("absent.npz", None, "No such file"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ColearnError, match=message):
        read_weights(path)


def test_a_whole_model_is_no_state_dict(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "model.pt")
    with pytest.raises(ColearnError, match=r"expected a state dict.*found list"):
        read_weights(tmp_path / "model.pt")


def test_a_bfloat16_state_dict_is_read_as_float32(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, path)
    found = read_weights(path)
    assert found["w"].dtype == np.float32
    assert found["w"].tolist() == [1.5, -2.0]
