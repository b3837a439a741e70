"""Sites with data of their own against each site alone, in a deployment on this machine.

Two sites have different folders of images, of scikit-learn's digits; a third folder, which no
process of the deployment gets, is the test. Each seed has three runs of the app by `flwr run`: both
sites, and each site alone with as many local epochs. Where the benchmark is started by root, the
SuperLink runs without the right to read the files of others, whose the folders are.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from clients.settings import ParticipantSettings
from clients.tasks.registry import server_task, server_trainer
from flwr_colearn import ColearnError, History
from simulations.launch.deployment import Deployment
from simulations.launch.simulation import ROOT

SITES = ("delft", "utrecht")
CLASSES = ",".join(map(str, range(10)))
TASK: dict[str, Any] = {
    "task": "imagefolder",
    "classes": CLASSES,
    "image_size": 16,
    "model": "resnet8",
}

PREFIX = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
"""The command under which root's SuperLink cannot read the files of other users."""
OTHER_USER = 65534
"""The user id to which the sites' folders belong; the sites' processes are root's and read them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to a parser."""
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--images", type=int, default=60, help="images of a site (default 60)")
    parser.add_argument("--epochs", type=int, default=24, help="local epochs (default 24)")
    parser.add_argument("--folder", type=Path, help="for the deployment's files; a temporary one")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the accuracy of every run, and the gain of the joint ones with its standard error."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="sites-"))
    write_folders(folder, options.images)
    deployment = Deployment(folder / "deployment", prefix=prefix())
    runs = {"both": SITES, **{site: (site,) for site in SITES}}
    rows: list[dict[str, float]] = []
    try:
        start(deployment, folder)
        for seed in range(options.seeds):
            rows.append({"seed": seed})
            for name, sites in runs.items():
                rows[-1][name] = accuracy(deployment, folder, sites, seed, options.epochs)
    finally:
        deployment.stop()
    gains = [row["both"] - max(row[site] for site in SITES) for row in rows]
    error = float(np.std(gains, ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else float("nan")
    return {
        "runs": rows,
        "gain over the better site": round(float(np.mean(gains)), 4),
        "standard error": round(error, 4),
        "the server can read a site's folder": can_read(deployment, folder / SITES[0]),
    }


def write_folders(folder: Path, images: int) -> None:
    """Write the images of each site and of the test; no image is in two of the folders."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    parts = np.split(order, [images, 2 * images])
    for name, indices in zip((*SITES, "test"), parts, strict=True):
        for index in indices:
            part = "test" if name == "test" else "train"
            path = folder / name / part / str(digits.target[index]) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 15.9).astype(np.uint8)).save(path)
        (folder / name).chmod(0o700)
        if os.geteuid() == 0:
            os.chown(folder / name, OTHER_USER, -1)


def prefix() -> tuple[str, ...]:
    """Return `PREFIX` if this process is root's and may give up the rights, else nothing."""
    if os.geteuid() != 0 or shutil.which(PREFIX[0]) is None:
        return ()
    trial = subprocess.run([*PREFIX, "true"], capture_output=True, check=False)
    return PREFIX if trial.returncode == 0 else ()


def can_read(deployment: Deployment, folder: Path) -> bool:
    """Return whether a process with the SuperLink's rights can list a folder."""
    listing = subprocess.run([*deployment.prefix, "ls", folder], capture_output=True, check=False)
    return listing.returncode == 0


def start(deployment: Deployment, folder: Path) -> None:
    """Start the servers and the two sites."""
    deployment.start_servers()
    for site in SITES:
        deployment.add_site(f'name="{site}" data-dir="{folder / site}"', name=site)
    deployment.await_nodes(len(SITES))


def accuracy(
    deployment: Deployment, folder: Path, sites: tuple[str, ...], seed: int, epochs: int
) -> float:
    """Train with these sites, and return the accuracy on the test folder.

    Raises
    ------
    ColearnError
        If the run did not finish.
    """
    name = f"{'-'.join(sites)}-{seed}"
    deployment.run(
        ROOT,
        **TASK,
        run_name=name,
        participants=",".join(sites),
        total_epochs=epochs,
        initial_epochs=8,
        max_local_epochs=8,
        batch_size=16,
        seed=seed,
    ).wait(timeout=1800)
    output = deployment.home / "colearn" / name
    if not (output / "summary.json").exists():
        raise ColearnError(
            f"run {name}: expected it to finish, found no summary; its log is "
            f"{deployment.folder / 'run.log'}"
        )
    last = History.read(output / "history.jsonl").records[-1]
    print(name, json.dumps(last.site_metrics), flush=True)
    settings = ParticipantSettings(**TASK, data_dir=str(folder / "test"), seed=seed)
    trainer = server_trainer(settings, server_task(settings))
    with np.load(output / "model.npz") as arrays:
        trainer.set_weights(dict(arrays))
    return round(trainer.evaluate()["accuracy"], 4)
