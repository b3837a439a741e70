"""participant_mod: all that a participant needs of this plugin, as one Flower mod."""

from collections.abc import Callable

from flwr.app import Context, Message

from .compression import compressed
from .normalization import with_local_arrays
from .recovery import echoed, name_of, supervised
from .state_dir import with_state_dir

Next = Callable[[Message, Context], Message]


def participant_mod(message: Message, context: Context, call_next: Next) -> Message:
    """Flower mod that does at a participant whatever the server's strategy and `Transport` ask for.

    It answers who the participant is, ends a training that hangs, decodes and encodes compressed
    models, and keeps here what a normalization scheme leaves with participants; it does nothing
    that no message asks for. The functions of the ClientApp see whole models of ordinary arrays.

    What it keeps is in ``context.state``, which ends with the SuperNode and with the run. A folder
    ``state-dir`` in the SuperNode's node config keeps all of ``context.state`` on disk besides, and
    a message of the same training (the same session) finds it there.

    Mods are called from first to last, and see replies from last to first: what changes the model,
    such as Flower's differential privacy mods, comes after this one, what measures messages before
    it.

    Raises
    ------
    ColearnError
        If the server has another version of this plugin, or a codec that is unknown here, or the
        model that it sent is damaged. Flower reports it to the server.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod])
    """
    name = name_of(context).get("participant", "participant")

    def describe(message: Message, context: Context) -> Message:
        return echoed(message, context, call_next)

    def localise(message: Message, context: Context) -> Message:
        return with_local_arrays(message, context, describe)

    def compress(message: Message, context: Context) -> Message:
        return compressed(message, context, localise)

    def remember(message: Message, context: Context) -> Message:
        return with_state_dir(message, context, compress, name)

    return supervised(message, context, remember)
