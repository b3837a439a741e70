import os
from pathlib import Path

import pytest

from flwr_colearn import ColearnError
from simulations.run_folder import RunFolder, run_name
from simulations.settings import RunSettings


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def folder_of(**config):
    config = {key.replace("_", "-"): value for key, value in config.items()}
    return RunFolder.of(RunSettings.from_config(config), config)


def test_relative_paths_are_below_the_runs_folder_in_flowers_home(home):
    folder = folder_of(run_name="xray")
    assert folder.path == home / "colearn" / "xray"
    assert folder.path.is_dir()
    assert folder.resolve("checkpoints") == home / "colearn" / "xray" / "checkpoints"
    assert folder.resolve("") is None
    assert folder.resolve("/srv/h.jsonl") == Path("/srv/h.jsonl")
    assert folder_of(run_name="xray", output_dir="two").path == home / "colearn" / "xray" / "two"


def test_an_absolute_output_folder_is_taken_as_it_is(tmp_path):
    assert folder_of(output_dir=str(tmp_path / "out")).path == tmp_path / "out"


def test_without_flwr_home_it_is_flowers_default(tmp_path, monkeypatch):
    monkeypatch.delenv("FLWR_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of(run_name="a").path == tmp_path / ".flwr" / "colearn" / "a"


def test_the_same_settings_have_the_same_name_and_others_another():
    config = {"task": "digits", "arm": "clr-ile", "seed": 0}
    assert run_name(config) == run_name(dict(reversed(config.items())))
    assert run_name(config).startswith("digits-clr-ile-")
    assert run_name({**config, "seed": 1}) != run_name(config)
    assert run_name({**config, "run-name": "mine"}) == "mine"
    assert "/" not in run_name({"task": "hospital.xray:task"})


@pytest.mark.parametrize("name", ["a/b", "..", "/etc", "a/"])
def test_a_name_is_no_path(name):
    with pytest.raises(ColearnError, match="'run-name': expected a file name, found"):
        folder_of(run_name=name)


def test_a_folder_that_cannot_be_written_is_an_error_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ColearnError, match=r"'output-dir': expected a folder that the Server"):
        folder_of(output_dir=str(tmp_path / "file" / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error_before_the_run(tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(ColearnError, match="Permission denied"):
        folder_of(output_dir=str(tmp_path / "out"))
