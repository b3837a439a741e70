"""The list of metrics that may leave a site: its node config's, or the argument of a mod."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord

from .errors import expected
from .records import records_of

SHARED = "colearn.shared-metrics"
"""The key of the ConfigRecord in a reply with the names that the server may record by site."""

LIST = "share-metrics"
"""The key in a SuperNode's node config with the names of the metrics that may leave the site."""

NAMES = "names"
ALWAYS = ("num-examples", "num_examples")
"""The number of examples leaves with every reply: without it a reply is refused."""

Next = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Next], Message]


def share_metrics(*names: str) -> Mod:
    """Return a Flower mod that lets only some metrics of a reply leave the participant.

    The same list in a SuperNode's node config, ``share-metrics="accuracy,train-loss"``, is the
    site's own, which no app and no server can extend: where there are both, a metric must be in
    both. The number of examples (``num-examples``) always leaves. The server records the listed
    metrics of each site by name, those of training too; without a list everything that the
    ClientApp returns leaves, and of training the means alone are recorded.

    Parameters
    ----------
    *names : str
        The names of metrics. ``*`` stands for any text: ``alone-*``.

    Raises
    ------
    ColearnError
        If a name is no text.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod, share_metrics("accuracy", "train-loss")])
    """
    for name in names:
        if not isinstance(name, str):
            raise expected("share_metrics", "names of metrics", name)

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        return _kept(call_next(message, context), names)

    return mod


def with_shared_metrics(message: Message, context: Context, call_next: Next) -> Message:
    """Flower mod that applies the list of the node config, if it has one."""
    names = _listed(context)
    reply = call_next(message, context)
    return reply if names is None else _kept(reply, names)


def shared_metrics(metrics: Iterable[str], context: Context) -> list[str]:
    """Return which of these metrics the site's node config names; none if it has no list.

    For metrics that leave a site only if it asks for it.
    """
    return [name for name in metrics if _matches(name, _listed(context) or ())]


def shared_by_site(reply: Message) -> dict[str, float]:
    """Return the metrics in a reply that its site has listed, those that are one number each."""
    if not reply.has_content():
        return {}
    listed = records_of(reply.content, ConfigRecord).get(SHARED, ConfigRecord()).get(NAMES, [])
    return {
        name: value
        for each in records_of(reply.content, MetricRecord).values()
        for name, value in each.items()
        if isinstance(listed, list) and name in listed and isinstance(value, int | float)
    }


def _listed(context: Context) -> tuple[str, ...] | None:
    text = context.node_config.get(LIST)
    if text is None:
        return None
    if not isinstance(text, str):
        raise expected(f"node config '{LIST}'", "names of metrics, separated by commas", text)
    return tuple(filter(None, map(str.strip, text.split(","))))


def _kept(reply: Message, names: Iterable[str]) -> Message:
    """Return a reply without the metrics that are not listed."""
    if not reply.has_content():
        return reply
    names, kept = tuple(names), []
    for key, metrics in list(records_of(reply.content, MetricRecord).items()):
        left = {n: v for n, v in metrics.items() if n in ALWAYS or _matches(n, names)}
        reply.content[key] = MetricRecord(left)
        kept += [name for name in left if name not in ALWAYS]
    # Flower's ConfigRecord cannot tell the type of an empty list.
    entries: Mapping[str, Any] = {NAMES: kept} if kept else {}
    reply.content[SHARED] = ConfigRecord({**entries})
    return reply


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
