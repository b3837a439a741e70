from types import SimpleNamespace

import psutil

from simulations.launch.deployment import Deployment


def child(*words):
    return SimpleNamespace(cmdline=lambda: list(words))


def ended():
    raise psutil.ZombieProcess(1)


def test_a_child_that_ends_meanwhile_is_passed_over(monkeypatch):
    wanted = child("python", "/bin/flwr-serverapp", "--token", "x")
    family = [SimpleNamespace(cmdline=ended), child("python", "/bin/flower-superexec"), wanted]
    parent = SimpleNamespace(children=lambda recursive: family)
    monkeypatch.setattr(psutil, "Process", lambda pid: parent)
    deployment = Deployment.__new__(Deployment)
    deployment.superlink = SimpleNamespace(pid=1)
    assert deployment.process_named("flwr-serverapp") is wanted
    assert deployment.process_named("flwr-clientapp") is None
