"""The paper's image experiments: their configs, and the folder of images as a study."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clients.settings import ParticipantSettings
from clients.tasks.kit import kit_for
from clients.torch.tasks import KITS
from simulations.settings import CONF, read_config
from simulations.study import __main__ as study

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

FOR_A_GPU = {"precision": "bfloat16", "channels-last": True, "augment": True}
PAPER = {"learning-rate": 0.01, "decay": 0.25, "num-participants": 5}

needs_data = pytest.mark.skipif(
    not Path(os.environ.get("COLEARN_DATA", ""), "tiny-imagenet-20").is_dir(),
    reason="set COLEARN_DATA to the folder that holds tiny-imagenet-20",
)


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="module")
def _log_level():
    """``main`` quietens Flower's log for good."""
    before = logging.getLogger("flwr").level
    yield
    logging.getLogger("flwr").setLevel(before)


@pytest.mark.parametrize(
    ("name", "parameters", "initial_epochs"),
    [
        ("cifar10-vgg19", 20_040_522, 5),
        ("cifar10-resnet152", 58_164_298, 5),
        ("cifar10-inception-v4", 41_158_186, 20),
        ("cifar10-inception-resnet-v2", 54_321_834, 5),
        ("imagenet-vgg19", 143_667_240, 5),
        ("imagenet-inception-v4", 42_679_816, 5),
        ("imagenet-resnetv2-101", 44_541_480, 5),
    ],
)
def test_the_papers_configs_have_its_networks_and_values(name, parameters, initial_epochs):
    config = read_config(CONF / f"{name}.toml")
    imagenet = name.startswith("imagenet")
    expected = {
        **PAPER,
        **FOR_A_GPU,
        "initial-epochs": initial_epochs,
        "batch-size": 256 if imagenet else 32,
    }
    assert {key: config[key] for key in expected} == expected
    settings = ParticipantSettings.from_config(config)
    if settings.model.startswith(("inception", "resnetv2")):
        pytest.importorskip("timm")
    build = kit_for(KITS, settings).model(settings)
    with torch.device("meta"):
        model = build(num_classes=1000 if imagenet else 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def write_config(folder, data_dir, **changes):
    config = {**read_config(CONF / "imagefolder-cpu.toml"), "data-dir": str(data_dir), **changes}
    path = folder / "images.toml"
    path.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items()))
    return path


def run(folder, config, *arms):
    output = folder / "results"
    study.main([str(config), "--seeds", "1", "--arms", *arms, "--output", str(output)])
    return {unit["arm"]: unit for unit in json.loads((output / "results.json").read_text())}


def save(path, seed, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(shade, shade + 60, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_folder_of_images_as_a_study(tmp_path):
    for number, name in enumerate(("dark", "grey", "light")):
        for part, count in (("train", 12), ("val", 4)):
            for index in range(count):
                save(tmp_path / part / name / f"{index}.jpg", 100 * number + index, 90 * number)
    config = write_config(
        tmp_path,
        tmp_path,
        **{"examples": 30, "image-size": 16, "num-participants": 2, "batch-size": 8},
        **{"total-epochs": 1, "precision": "float32"},
    )
    units = run(tmp_path, config, "clr-ile", "vanilla-elr")
    assert list(units) == ["clr-ile", "vanilla-elr"]
    for unit in units.values():
        assert unit["epochs"] == [1]
        assert len(unit["metrics"]["accuracy"]) == 1
        [accuracy] = unit["metrics"]["accuracy"]
        assert accuracy * 12 == pytest.approx(round(accuracy * 12))
        assert unit["config"]["image-size"] == 16
    assert units["clr-ile"]["bytes"] > units["vanilla-elr"]["bytes"] == 0
    assert (tmp_path / "colearn-scan.json").is_file()


@needs_data
def test_real_images_as_a_study(tmp_path):
    for part in ("train", "val"):
        folder = Path(os.environ["COLEARN_DATA"], "tiny-imagenet-20", part).absolute()
        (tmp_path / part).symlink_to(folder)
    config = write_config(
        tmp_path,
        tmp_path,
        **{"examples": 1000, "image-size": 32, "num-participants": 2, "total-epochs": 2},
    )
    unit = run(tmp_path, config, "clr-ile")["clr-ile"]
    assert unit["epochs"] == [1, 2]
    assert unit["metrics"]["accuracy"][-1] > 0.065  # chance is 0.05, of 1,000 images
