import pytest

from clients.tensorflow import setup
from clients.tensorflow.setup import check_device, tf
from flwr_colearn import ColearnError


def test_memory_of_every_gpu_grows(monkeypatch):
    grown = {}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind}:0", f"{kind}:1"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", grown.__setitem__)
    setup.grow_memory()
    assert grown == {"GPU:0": True, "GPU:1": True}


def test_gpus_already_in_use_stay_as_they_are(monkeypatch):
    def too_late(gpu, on):
        raise RuntimeError("Physical devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", too_late)
    setup.grow_memory()


@pytest.mark.parametrize("name", ["cpu", "CPU:0", "/cpu:0"])
def test_devices_have_several_spellings(name):
    assert check_device(name) == "CPU:0"


@pytest.mark.parametrize("name", ["cuda:0", "gpu:99", "CPU:1"])
def test_devices_that_are_not_there_are_refused(name):
    with pytest.raises(ColearnError, match=f"expected one of CPU:0.*found '{name}'"):
        check_device(name)
