"""The folder of an app as ``flwr run`` should find it."""

import shutil
from pathlib import Path

_NOT_OF_THE_APP = shutil.ignore_patterns(".*", "__pycache__", "outputs", "site")


def app_files(app: Path, scratch: Path) -> Path:
    """Return a folder that has the files of an app, but no virtual environment.

    ``flwr run`` resolves the path of every file below the folder of an app before it chooses those
    of the app. With ``.venv`` these are some hundred thousand, which takes ten seconds.

    Parameters
    ----------
    app : Path
        The folder of the app.
    scratch : Path
        A folder outside of it for a copy, which replaces an earlier one.

    Returns
    -------
    Path
        `app`, or if it has ``.venv``, the copy.
    """
    if not (app / ".venv").is_dir():
        return app
    shutil.rmtree(scratch, ignore_errors=True)
    return Path(shutil.copytree(app, scratch, ignore=_NOT_OF_THE_APP))
