"""The plugin's own tests against both ends of the range of Flower versions: `nox`.

They need neither torch nor TensorFlow, so a session is small. Only the tools are those of
constraints.txt: flwr 1.29 asks for older releases of its own dependencies than that holds.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"

# flwr 1.42.0 asks for certifi>=2026.10.19, which could not be had when this was tested.
VERSIONS = ("1.29.0", "1.41.0")
TOOLS = ("build", "hatchling", "hypothesis", "numpy", "pytest", "pytest-timeout")


@nox.session
@nox.parametrize("flwr", VERSIONS)
def flower(session: nox.Session, flwr: str) -> None:
    """Run the tests of flwr_colearn, deployments and studies left out, with one Flower version."""
    pins = Path("constraints.txt").read_text().split()
    session.install(f"flwr=={flwr}", *(pin for pin in pins if pin.partition("==")[0] in TOOLS))
    session.install("--no-deps", "--editable", ".")
    session.run("python", "-m", "pip", "check")
    tests = map(str, sorted(Path("tests").glob("test_*.py")))
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *session.posargs)
