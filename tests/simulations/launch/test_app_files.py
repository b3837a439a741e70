"""The copy of an app has the files of the app, and makes the same FAB."""

from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from simulations.launch.app_files import app_files
from simulations.launch.simulation import ROOT


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_environment_and_outputs_are_left_out(tmp_path):
    app = make(
        tmp_path / "app", ".venv/lib/a.py", "outputs/b.npz", "pyproject.toml", "package/c.py"
    )
    found = app_files(app, tmp_path / "scratch")
    assert names_in(found) == {"pyproject.toml", "package/c.py"}


def test_a_later_copy_has_no_files_of_an_earlier_one(tmp_path):
    app = make(tmp_path / "app", ".venv/a.py", "old.py")
    app_files(app, tmp_path / "scratch")
    (app / "old.py").rename(app / "new.py")
    assert names_in(app_files(app, tmp_path / "scratch")) == {"new.py"}


def test_without_an_environment_the_app_is_not_copied(tmp_path):
    app = make(tmp_path / "app", "pyproject.toml")
    assert app_files(app, tmp_path / "scratch") == app
    assert not (tmp_path / "scratch").exists()


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="no .venv in the checkout")
def test_the_copy_of_this_repository_makes_the_same_fab(tmp_path):
    copy = app_files(ROOT, tmp_path / "scratch")
    assert copy == Path(tmp_path, "scratch")
    assert build_fab_from_disk(copy) == build_fab_from_disk(ROOT)
