"""RewritingGrid: the base of layers that change what messages hold on their way."""

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from .._flwr import CLIENT_RAISED, REFUSED, copied, error_reply, set_message_id
from ..errors import ColearnError, NotAnsweredError
from .wrapping import WrappingGrid


class RewritingGrid(WrappingGrid):
    """A Grid around any Grid that sends other contents than it was given, and restores replies.

    A subclass says what is sent in place of a content (`outgoing`), and what a reply is to be
    (`incoming`). Whoever uses the grid knows its own messages only: they bear the ids of those that
    were sent in their places.

    Parameters
    ----------
    grid : Grid
        The one inside.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._sent: dict[str, Message] = {}

    def outgoing(self, message: Message) -> RecordDict:
        """Return the content to send: a new one, or the message's own if nothing is to change.

        The message's content may be shared by several messages and must not be changed. `incoming`
        is called for replies to messages whose content was changed.
        """
        return message.content

    def incoming(self, sent: Message, reply: Message) -> None:
        """Change the content of a reply in place.

        Parameters
        ----------
        sent : Message
            As it was given to this grid.
        reply : Message
            Its reply, which has a content.

        Raises
        ------
        ColearnError
            If the reply is no good. An error reply with the code `REFUSED` takes its place.
        NotAnsweredError
            If the participant must be asked again. The error reply has Flower's code for a
            participant that failed.
        """

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push the messages, with the contents that are to be sent."""
        pairs = [(message, self._rewritten(message)) for message in messages]
        ids = list(self.grid.push_messages([pushed for _, pushed in pairs]))
        self._remember(pairs)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies and restore them."""
        return [self._restored(reply) for reply in self.grid.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send the messages, with the contents that are to be sent, and return restored replies."""
        pairs = [(message, self._rewritten(message)) for message in messages]
        replies = list(self.grid.send_and_receive([pushed for _, pushed in pairs], timeout=timeout))
        self._remember(pairs)
        restored = [self._restored(reply) for reply in replies]
        self.forget([message.metadata.message_id for message, _ in pairs])
        return restored

    def forget(self, message_ids: Iterable[str]) -> None:
        """Let go of messages; a reply that arrives all the same is passed on as it is."""
        ids = list(message_ids)
        for message_id in ids:
            self._sent.pop(message_id, None)
        super().forget(ids)

    def _rewritten(self, message: Message) -> Message:
        if not message.has_content():
            return message
        content = self.outgoing(message)
        return message if content is message.content else copied(message, content)

    def _remember(self, pairs: list[tuple[Message, Message]]) -> None:
        for message, pushed in pairs:
            if pushed is not message:
                set_message_id(message, pushed.metadata.message_id)
                self._sent[pushed.metadata.message_id] = message

    def _restored(self, reply: Message) -> Message:
        sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
        if sent is None or reply.has_error():
            return reply
        try:
            self.incoming(sent, reply)
        except NotAnsweredError as error:
            return error_reply(sent, reply, CLIENT_RAISED, str(error))
        except ColearnError as error:
            return error_reply(sent, reply, REFUSED, str(error))
        return reply
