"""The Flower app in a folder of its own, for FAB format 1: ``python -m simulations.export``."""

import argparse
import re
import shutil
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w  # flwr, which writes a FAB's pyproject.toml with it, brings it

from flwr_colearn import ColearnError

ROOT = Path(__file__).resolve().parent.parent
EXTRA = "torch"
"""The extra with the dependencies of the run config's default ``framework``."""


def export(folder: Path, root: Path = ROOT) -> None:
    """Write the app to a new folder, of which ``flwr build`` makes a FAB of format 1.

    The folder has the files that the repository's ``fab-include`` and ``fab-exclude`` name, and a
    ``pyproject.toml`` whose ``[project].dependencies`` are all that the app needs.

    Parameters
    ----------
    folder : Path
        The folder to write.
    root : Path
        The repository.

    Raises
    ------
    ColearnError
        If `folder` exists: files that are left from an earlier export would be part of the FAB.
    """
    if folder.exists():
        raise ColearnError(
            f"folder of the app: expected a new folder, found that {folder} exists; remove it, or "
            "name another folder"
        )
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    for path in app_files(root, pyproject["tool"]["flwr"]["app"]):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "pyproject.toml").write_text(tomli_w.dumps(app_pyproject(pyproject)))


def app_files(root: Path, app: Mapping[str, Any]) -> list[Path]:
    """Return the files that ``[tool.flwr.app]`` includes and does not exclude."""

    def listed(key: str) -> set[Path]:
        # A leading slash anchors a pattern of Flower's; pathlib's patterns are anchored.
        return {path for pattern in app[key] for path in root.glob(pattern.removeprefix("/"))}

    return sorted(listed("fab-include") - listed("fab-exclude"))


def app_pyproject(pyproject: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``pyproject.toml`` of the app, given the repository's."""
    project, app = pyproject["project"], pyproject["tool"]["flwr"]["app"]
    same = ("name", "version", "description", "readme", "requires-python")
    packages = ["flwr_colearn", "clients", "simulations"]
    # As in Flower's own apps: with the simulation's dependencies, which `flwr run` without a
    # deployment needs.
    own = [re.sub(r"^flwr\b", "flwr[simulation]", line) for line in project["dependencies"]]
    # Every pattern must match a file of the folder, and those to exclude were left out.
    app = {key: value for key, value in app.items() if key != "fab-exclude"}
    return {
        "build-system": pyproject["build-system"],
        "project": {
            **{key: project[key] for key in same},
            "license": {"file": "LICENSE"},
            "dependencies": [*own, *project["optional-dependencies"][EXTRA]],
        },
        "tool": {
            "hatch": {"build": {"targets": {"wheel": {"packages": packages}}}},
            "flwr": {"app": {"fab-format-version": 1, **app}},
        },
    }


def main() -> int:
    """Write the folder; return 0 if that succeeded."""
    parser = argparse.ArgumentParser(prog="python -m simulations.export", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "outputs" / "app")
    folder = parser.parse_args().folder
    try:
        export(folder)
    except ColearnError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The app is in {folder}; flwr build --app {folder} bundles it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
