"""participant_mod: the participant's side of this plugin, as one Flower mod."""

from collections.abc import Callable

from flwr.app import Context, Message

from .compression import compressed
from .normalization import with_local_arrays
from .recovery import discreet, echoed, name_of, supervised
from .secure import masked
from .sharing import with_shared_metrics
from .state_dir import with_state_dir

Next = Callable[[Message, Context], Message]


def participant_mod(message: Message, context: Context, call_next: Next) -> Message:
    """Flower mod with the participant's part of the server's strategy and `Transport`.

    The mod reports the participant's name, ends a training that hangs, decodes and encodes
    compressed models, stores the local arrays of a normalization scheme, and sends the trained
    model under masks. Each of these is done only if the message requests it. The functions of the
    ClientApp receive and return complete models of ordinary arrays.

    The mod's state is in ``context.state``, which Flower drops at the end of the SuperNode and of
    the run. With a folder ``state-dir`` in the SuperNode's node config, all of ``context.state`` is
    saved on disk too, and is restored for a message of the same training (the same session). For
    an interrupted round see `LocalPlan.resumable`.

    Of an exception only the type and the messages of this plugin leave the site, since the text of
    others may hold a file name or a value of the data; Flower alone would send the text. The text
    is in the participant's log. ``exception-text=true`` in the SuperNode's node config, for sites
    that trust the server with it, lets it leave. An exception of a mod before this one leaves as
    Flower sends it.

    With ``share-metrics="accuracy,train-loss"`` in the SuperNode's node config only the metrics in
    this list, and the number of examples, leave the site; see `flwr_colearn.share_metrics`.

    Flower calls mods from first to last for a message, and from last to first for its reply. Mods
    that change the model, such as Flower's differential privacy mods, belong after this one, and
    mods that measure messages before it.

    Raises
    ------
    ColearnError
        If the server has another version of this plugin, the codec is unknown at the participant,
        or the received model is damaged. Flower reports the error to the server.
    ParticipantError
        If the ClientApp raised another exception.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod])
    """

    # From inside to outside. The echo describes the model as the ClientApp returned it. Metrics
    # that stay at the site are removed inside secure aggregation, so that they are in no sum.
    # Local arrays are inside compression, since they complete the decoded model. Secure aggregation
    # is between them: only exchanged arrays are masked, and the model is received compressed. The
    # state folder is outside all three, since it saves their state. Supervision is outside of all
    # layers: it checks the version before a layer reads the message, and its time limit is that of
    # all layers. Only the treatment of exceptions is outside of it, since every part may raise one.
    def describe(message: Message, context: Context) -> Message:
        return echoed(message, context, call_next)

    def share(message: Message, context: Context) -> Message:
        return with_shared_metrics(message, context, describe)

    def localise(message: Message, context: Context) -> Message:
        return with_local_arrays(message, context, share)

    def mask(message: Message, context: Context) -> Message:
        return masked(message, context, localise, name_of(context).get("participant"))

    def compress(message: Message, context: Context) -> Message:
        return compressed(message, context, mask)

    def remember(message: Message, context: Context) -> Message:
        name = name_of(context).get("participant", "participant")
        return with_state_dir(message, context, compress, name)

    def supervise(message: Message, context: Context) -> Message:
        return supervised(message, context, remember)

    return discreet(message, context, supervise)
