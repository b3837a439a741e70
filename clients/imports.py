"""Functions of users, which the run config names as "package.module:function"."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from flwr_colearn import ColearnError


def imported(key: str, name: str) -> Callable[..., Any]:
    """Return the function that a key of the run config names.

    Parameters
    ----------
    key : str
        The key, for the error message.
    name : str
        "package.module:function".

    Raises
    ------
    ColearnError
        If the module is not installed here, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's own module fails to import is another trouble with another name.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ColearnError(
            f"run config '{key}': expected {name!r} to be importable, found no module "
            f"{error.name!r}; install its package on the server and at every site"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ColearnError(
            f"run config '{key}': expected a function {function_name!r} in {module_name}, found "
            f"{function!r}"
        )
    return function  # type: ignore[no-any-return]
