"""AppReference: a ClientApp by name or as a function, so that another process can make it too."""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, TypeGuard

from flwr.clientapp import ClientApp

from ..errors import ColearnError, expected

AnyApp = ClientApp | str | Callable[[], ClientApp]
"""A ClientApp, its name as ``"module:attribute"``, or a function that returns it."""

_ADVICE = (
    "give InProcessGrid the app's name ('package.module:app'), a module's app, or a function of a "
    "module (also functools.partial of one, with arguments that pickle) that returns the app"
)


@dataclass(frozen=True)
class AppReference:
    """A reference to a ClientApp.

    Parameters
    ----------
    app : ClientApp, str or callable
        The app, its name, or a function without parameters that returns it.
    """

    app: AnyApp

    def load(self) -> ClientApp:
        """Return the ClientApp.

        Raises
        ------
        ColearnError
            If there is no ClientApp of that name, or the function returns another object.
        """
        found: Any
        if isinstance(self.app, str):
            found = _named(self.app)
        elif _is_function(self.app):
            found = self.app()
        else:
            return self.app  # type: ignore[return-value]
        if not callable(found):
            raise expected(f"client_app {self.app!r}", "a ClientApp", found)
        return found  # type: ignore[no-any-return]

    def portable(self) -> bytes:
        """Return the reference, pickled, for a process that has none of this one's objects.

        Raises
        ------
        ColearnError
            If the app is in no imported module, or the function cannot be pickled.
        """
        named = isinstance(self.app, str) or _is_function(self.app)
        app = self.app if named else _name_of(self.app)
        try:
            return pickle.dumps(AppReference(app))
        except Exception as error:  # pickle raises many types
            reason = f"{type(error).__name__}: {error}"
        raise ColearnError(
            f"client_app: expected a function that other processes can import, found {self.app!r} "
            f"({reason}); {_ADVICE}"
        )


def _named(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not module or not colon or not attribute:
        raise expected("client_app", "a name like 'package.module:app'", name)
    found = import_module(module)
    if not hasattr(found, attribute):
        raise expected(f"client_app {name!r}", f"{module} to have {attribute!r}", None)
    return getattr(found, attribute)


def _is_function(app: object) -> TypeGuard[Callable[[], ClientApp]]:
    """Return whether an object is no app but a function, without parameters, that returns one."""
    if isinstance(app, ClientApp) or not callable(app):
        return False
    # Whatever else is called with a message and a context is used as an app.
    try:
        signature(app).bind()
    except (TypeError, ValueError):
        return False
    return True


def _name_of(app: object) -> str:
    """Return the name of an app that is an attribute of an imported module."""
    # As pickle does for functions that do not know their module.
    for module, contents in list(sys.modules.items()):
        for attribute, value in list(getattr(contents, "__dict__", {}).items()):
            if value is app:
                return f"{module}:{attribute}"
    raise ColearnError(
        "client_app: expected an app that other processes can import, found a ClientApp that is in "
        f"no module; {_ADVICE}"
    )
