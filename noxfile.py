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


# What needs a framework, Flower's simulation or a deployment.
ELSEWHERE = ("clients", "simulations", "dropin", "e2e")


def plugin_tests(root: Path) -> list[Path]:
    """Return the plugin's own tests: every file below `root` except those of `ELSEWHERE`."""
    found = root.rglob("test_*.py")
    return [path for path in found if path.relative_to(root).parts[0] not in ELSEWHERE]


@nox.session
@nox.parametrize("flwr", VERSIONS)
def flower(session: nox.Session, flwr: str) -> None:
    """Run the tests of flwr_colearn, deployments and studies left out, with one Flower version."""
    pins = Path("constraints.txt").read_text().split()
    session.install(f"flwr=={flwr}", *(pin for pin in pins if pin.partition("==")[0] in TOOLS))
    session.install("--no-deps", "--editable", ".")
    session.run("python", "-m", "pip", "check")
    tests = map(str, sorted(plugin_tests(Path("tests"))))
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *session.posargs)
