"""The app's folder: Flower bundles it in format 1, and it runs with its own dependencies alone."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import PurePosixPath

import pytest
from flwr.supercore.fab_format_version import FabFormatMetadata, normalize_and_validate_fab_format
from packaging.requirements import Requirement

from flwr_colearn import ColearnError
from simulations.export import ROOT, export, main
from simulations.launch.simulation import flower

# Runs the default app in process.
SHORT_RUN = """
import json, sys, tomllib

app, site, output = sys.argv[1:]
sys.path[:0] = [app, site]

from flwr.app import Context, RecordDict
import flwr_colearn
from clients.app import app as client_app
from simulations import server_app

config = tomllib.load(open(app + "/pyproject.toml", "rb"))["tool"]["flwr"]["app"]["config"]
changes = {"num-participants": 2, "total-epochs": 1, "examples": 100, "devices": "cpu"}
config = {**config, **changes, "output-dir": output}
grid = flwr_colearn.InProcessGrid(client_app, 2, run_config=config)
server_app.main(grid, Context(1, 0, {}, RecordDict(), config))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def distributions(requirements):
    """The installed distributions that these requirements bring, each with its own."""
    found, waiting = {}, [(Requirement(line), "") for line in requirements]
    while waiting:
        wanted, of = waiting.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": of}):
            continue
        # Some are of other platforms than the one that was installed for, such as CUDA's.
        with contextlib.suppress(metadata.PackageNotFoundError):
            for extra in ("", *wanted.extras):
                if (wanted.name, extra) not in found:
                    found[wanted.name, extra] = metadata.distribution(wanted.name)
                    lines = metadata.requires(wanted.name) or []
                    waiting += [(Requirement(line), extra) for line in lines]
    return {name: distribution for (name, _), distribution in found.items()}


def link(found, folder):
    """Make a folder that has what these distributions installed, and nothing else."""
    folder.mkdir()
    for distribution in found.values():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(distribution.locate_file(name))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository."""
    folder = tmp_path_factory.mktemp("source") / "repository"
    leave_out = shutil.ignore_patterns("__pycache__", ".*", "outputs", "data")
    shutil.copytree(ROOT, folder, ignore=leave_out)
    return folder


def bundle(folder, work):
    """What ``flwr build`` makes of a folder."""
    work.mkdir()
    subprocess.run(
        [flower("flwr"), "build", "--app", str(folder)],
        cwd=work,
        check=True,
        capture_output=True,
        timeout=300,
    )
    [path] = work.glob("*.fab")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def fab(source, tmp_path_factory):
    """The FAB of the app's folder."""
    work = tmp_path_factory.mktemp("export")
    export(work / "app", source)
    return bundle(work / "app", work / "fab")


def pyproject_of(fab):
    return tomllib.loads(fab.read("pyproject.toml").decode())


def test_flower_takes_it_as_format_1(fab):
    found = normalize_and_validate_fab_format(pyproject_of(fab))
    assert found == FabFormatMetadata(1, "1.29", "1.42.0")
    assert fab.read("LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_it_has_the_app_and_neither_tests_nor_docs(fab):
    names = {PurePosixPath(name) for name in fab.namelist()}
    folders, files = ("clients", "flwr_colearn", "simulations"), ("LICENSE", "README.md")
    assert {name.parts[0] for name in names} == {*folders, *files, "pyproject.toml", ".info"}
    assert not any(re.search("test|docs|bench|study|deploy", str(name.parent)) for name in names)
    for folder in ("clients", "flwr_colearn"):
        there = {PurePosixPath(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert {name for name in names if name.parts[0] == folder} == there


def test_a_run_at_the_root_sends_the_same_files(fab, source, tmp_path):
    at_root = bundle(source, tmp_path / "root")
    assert sorted(at_root.namelist()) == sorted(fab.namelist())
    run_at_root, own = (each["tool"]["flwr"]["app"] for each in map(pyproject_of, (at_root, fab)))
    assert (own["components"], own["config"]) == (run_at_root["components"], run_at_root["config"])


def test_it_runs_on_a_machine_with_its_dependencies_alone(fab, tmp_path):
    app, site = tmp_path / "app", tmp_path / "site"
    fab.extractall(app)
    link(distributions(pyproject_of(fab)["project"]["dependencies"]), site)
    done = subprocess.run(  # -S: without what is installed here
        [sys.executable, "-I", "-S", "-c", SHORT_RUN, str(app), str(site), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert {"torch", "sklearn"} <= set(json.loads(done.stdout.splitlines()[-1]))
    assert json.loads((tmp_path / "summary.json").read_text())["local-epochs"] == 1
    assert not (site / "pytest").exists()


def test_an_export_before_is_not_mixed_with_a_new_one(tmp_path, monkeypatch, capsys):
    with pytest.raises(ColearnError, match=f"expected a new folder, found that {tmp_path} exists"):
        export(tmp_path)
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path)])
    assert main() == 1
    assert "remove it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
