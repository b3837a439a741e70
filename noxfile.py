"""The plugin's own tests against Flower's versions from the oldest to the newest: `nox`.

They need neither torch nor TensorFlow, so a session is small. Only the tools are those of
constraints.txt: flwr 1.29 asks for older releases of its own dependencies than that holds.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"

VERSIONS = ("1.29.0", "1.34.0", "1.42.0")
TOOLS = ("build", "hatchling", "hypothesis", "matplotlib", "numpy", "pytest", "pytest-timeout")


@nox.session
@nox.parametrize("flwr", VERSIONS)
def flower(session: nox.Session, flwr: str) -> None:
    """Run the tests of flwr_colearn, deployments and studies left out, with one Flower version.

    1.34 is the newest with which NVFlare 2.9 works.
    """
    pins = Path("constraints.txt").read_text().split()
    session.install(f"flwr=={flwr}", *(pin for pin in pins if pin.partition("==")[0] in TOOLS))
    session.install("--no-deps", "--editable", ".")
    session.run("python", "-m", "pip", "check")
    # The other folders' tests need a framework, Flower's simulation or a deployment.
    tests = ("tests/flwr_colearn", "tests/test_layers.py", "tests/test_packaging.py")
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *session.posargs)
