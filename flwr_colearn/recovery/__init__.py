"""Recovery: participants that fail are restarted in the same round, or left out by a policy."""

from .client import echoed, name_of, supervised
from .exceptions import discreet
from .grid import RecoveringGrid, recovery_on
from .identity import Directory
from .membership import Members, choose_members, too_few_in_process, wait_for_nodes

__all__ = [
    "Directory",
    "Members",
    "RecoveringGrid",
    "choose_members",
    "discreet",
    "echoed",
    "name_of",
    "recovery_on",
    "supervised",
    "too_few_in_process",
    "wait_for_nodes",
]
