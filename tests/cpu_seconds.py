"""Prints the tests that take most CPU time: ``python -m pytest -p tests.cpu_seconds``.

CPU time and not wall time, which depends on what else the machine does. A child process counts for
the test in which it is waited for, which for a deployment may be the last of its file. Without
pytest-xdist, whose processes print nothing.
"""

import resource

import pytest

SHOWN = 20

_spent: dict[str, tuple[float, float]] = {}


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def both() -> tuple[float, float]:
    return cpu_seconds(resource.RUSAGE_SELF), cpu_seconds(resource.RUSAGE_CHILDREN)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    before = both()
    result = yield
    own, children = (now - then for now, then in zip(both(), before, strict=True))
    _spent[item.nodeid] = own, children
    return result


def pytest_terminal_summary(terminalreporter):
    own, children = (sum(column) for column in zip(*_spent.values(), strict=True))
    terminalreporter.section(f"CPU seconds: {own:.0f}, and {children:.0f} of children")
    for name in sorted(_spent, key=lambda name: -sum(_spent[name]))[:SHOWN]:
        terminalreporter.write_line("{:8.2f} {:8.2f}  {}".format(*_spent[name], name))
