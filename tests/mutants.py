"""A mutation run of the core: ``make mutants``, or ``python -m tests.mutants --count 20 --seed 3``.

A mutant is the package with one change: another comparison, operator or constant, or without a
``not`` or a ``raise``. It is killed if a test of its module fails or takes too long. One that
survives is behaviour that no test guards, unless the change makes no difference. (mutmut and
cosmic-ray take no sample with a seed, and cosmic-ray runs one command for all modules.)
"""

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

CORE = {
    "aggregation": [
        "aggregation",
        "strategies/test_averaging.py",
        "strategies/test_synchronous.py",
        "test_guard.py",
        "test_examples.py",
    ],
    "recovery": ["recovery"],
    "strategies": ["strategies", "aggregation/test_variances.py"],
    "policy.py": ["recovery", "test_guard.py", "test_examples.py", "test_clocks.py"],
    "plan.py": ["test_plan.py", "strategies/test_own_schedules.py"],
    "schedules.py": ["test_schedules.py", "strategies/test_own_schedules.py"],
    "checkpoint.py": ["test_checkpoint.py", "test_resume.py"],
    "compression": ["compression", "dynamic/test_compression.py"],
    "secure": ["secure"],
    "normalization": ["normalization", "strategies/test_averaging.py", "test_transport.py"],
}
"""The modules of the core, and the tests that should notice a change of each."""

SLOW = (
    "any_number_of_failures or fewer_than_the_policy or hundred_rounds or again_and_again or "
    "ends_a_run or bytes_are_an_array or anything_but_a_colearn_error or gives_a_wrong_array or "
    "stock_strategies_keep"
)
"""Tests that are left out, as an expression of pytest, since they take most of the time."""

PAIRS = [
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or),
]  # fmt: skip
SWAPS = {**dict(PAIRS), **{other: one for one, other in PAIRS}}


class Mutant(NamedTuple):
    """One change: `node` of the file at `path` becomes `after`."""

    module: str
    path: Path
    node: ast.AST
    after: str

    def __str__(self) -> str:
        place = f"{self.path.relative_to(ROOT)}:{self.node.lineno}"
        return f"{place}: {ast.unparse(self.node)}  ->  {self.after}"

    def source(self) -> bytes:
        """Return the text of the changed file."""
        text, node = self.path.read_bytes(), self.node
        lines = [b"", *text.splitlines(keepends=True)]
        start = len(b"".join(lines[: node.lineno])) + node.col_offset
        end = len(b"".join(lines[: node.end_lineno])) + node.end_col_offset
        return text[:start] + self.after.encode() + text[end:]


def all_mutants() -> Iterator[Mutant]:
    """Yield every mutant of the core, in a fixed order."""
    for module in CORE:
        place = ROOT / "flwr_colearn" / module
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            for node in nodes_below(ast.parse(path.read_bytes())):
                after = changed(node)
                if after is not None:
                    yield Mutant(module, path, node, after)


def nodes_below(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a node, without texts of messages, assertions, types, decorators."""
    for field, value in ast.iter_fields(node):
        if field in ("decorator_list", "annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            strict = isinstance(child, ast.keyword) and child.arg == "strict"
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Assert):
                yield child
                yield from () if strict else nodes_below(child)


def changed(node: ast.AST) -> str | None:
    """Return the source of a node after its change; None for a node that is not changed."""
    match node:
        case ast.Raise():
            return "pass"
        case ast.UnaryOp(op=ast.Not()):
            return f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool()):
            return str(not node.value)
        case ast.Constant(value=int() | float()):
            return f"({node.value + 1})"
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            swapped = ast.Compare(node.left, [SWAPS[type(op)]()], node.comparators)
        case ast.BinOp(op=op) if type(op) in SWAPS:
            swapped = ast.BinOp(node.left, SWAPS[type(op)](), node.right)
        case ast.BoolOp(op=op):
            swapped = ast.BoolOp(SWAPS[type(op)](), node.values)
        case _:
            return None
    return f"({ast.unparse(swapped)})"


def passes(module: str, folder: Path, limit: float | None = None) -> bool:
    """Return whether a module's tests pass in a copy of the repository, within so many seconds."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", f"not ({SLOW})"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *CORE[module]],
        cwd=folder / "tests" / "flwr_colearn",
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def kill(sample: list[Mutant], folder: Path) -> int:
    """Return the number of mutants that tests kill, in a copy of the repository."""
    limits, killed = {}, 0
    for mutant in sample:
        if mutant.module not in limits:
            begun = time.monotonic()
            if not passes(mutant.module, folder):
                sys.exit(f"{mutant.module}: expected tests that pass without a mutant")
            limits[mutant.module] = 10 + 3 * (time.monotonic() - begun)
        path = folder / mutant.path.relative_to(ROOT)
        path.write_bytes(mutant.source())
        survived = passes(mutant.module, folder, limits[mutant.module])
        killed += not survived
        print("survived" if survived else "killed  ", mutant, flush=True)
        shutil.copy(mutant.path, path)
    return killed


def main() -> None:
    """Run a sample of the mutants, and print the score."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    mutants = list(all_mutants())
    sample = random.Random(arguments.seed).sample(mutants, arguments.count)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "copy")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "outputs"))
        killed = kill(sample, folder)
    print(f"{killed} of {len(sample)} mutants killed, of {len(mutants)} possible ones")


if __name__ == "__main__":
    main()
