"""What `make mutants` changes, and that its table of tests is that of the folders."""

import ast

import pytest

from tests.mutants import CORE, ROOT, Mutant, all_mutants, changed, nodes_below


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("x = a < b", ["(a <= b)"]),
        ("x = a != b", ["(a == b)"]),
        ("x = a is not None", ["(a is None)"]),
        ("x = a in b and c or d", ["((a in b and c) and d)", "(a in b or c)", "(a not in b)"]),
        ("x = a - b * c", ["(a + b * c)", "(b / c)"]),
        ("x = not a", ["(a)"]),
        ("x = f(0, 2.5, y=True)", ["(1)", "(3.5)", "False"]),
        ("if a:\n    raise ValueError(f'{a + 1}')", ["pass"]),
        (
            "@d(frozen=True)\ndef f(a: 3) -> 4:\n    assert a > 1\n    return zip(a, strict=True)",
            [],
        ),
        ("x = 'text' ** y", []),
    ],
)
def test_what_is_changed(source, changes):
    found = [changed(node) for node in nodes_below(ast.parse(source))]
    assert [each for each in found if each is not None] == changes


def test_only_the_place_changes_also_behind_letters_of_several_bytes(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("# ü\nx = 'é', a <\\\n  b  # ö\ny = 1\n")
    nodes = nodes_below(ast.parse(path.read_bytes()))
    (node,) = [node for node in nodes if isinstance(node, ast.Compare)]
    mutant = Mutant("module.py", path, node, changed(node))
    assert mutant.source().decode() == "# ü\nx = 'é', (a <= b)  # ö\ny = 1\n"


def test_every_module_of_the_core_has_mutants_and_tests():
    assert {mutant.module for mutant in all_mutants()} == set(CORE)
    for tests in CORE.values():
        assert all((ROOT / "tests" / "flwr_colearn" / test).exists() for test in tests)
