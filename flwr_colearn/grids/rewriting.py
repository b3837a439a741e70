"""RewritingGrid: the base class of layers that change the contents of messages."""

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from .._flwr import CLIENT_RAISED, REFUSED, copied, error_reply, set_message_id
from ..errors import ColearnError, NotAnsweredError
from .wrapping import WrappingGrid


class RewritingGrid(WrappingGrid):
    """A Grid around any Grid that replaces the contents of messages and restores replies.

    A subclass defines the content to send (`outgoing`) and the change of a reply (`incoming`). The
    caller's own messages stay unchanged, except that they get the ids of the messages that were
    sent instead.

    Parameters
    ----------
    grid : Grid
        The inner grid.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._sent: dict[str, Message] = {}

    def outgoing(self, message: Message) -> RecordDict:
        """Return the content to send: a new one, or the message's own without a change.

        The message's content may be shared by several messages and must not be changed. `incoming`
        is called only for replies to messages whose content was replaced.
        """
        return message.content

    def incoming(self, sent: Message, reply: Message) -> None:
        """Change the content of a reply in place.

        Parameters
        ----------
        sent : Message
            The message as it was given to this grid.
        reply : Message
            The reply to it, which has a content.

        Raises
        ------
        ColearnError
            If the reply is invalid. An error reply with the code `REFUSED` replaces it.
        NotAnsweredError
            If the message must be sent again. The error reply has Flower's code for a participant
            that failed.
        """

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push the messages with their new contents."""
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
        """Send the messages with their new contents, and return the restored replies."""
        pairs = [(message, self._rewritten(message)) for message in messages]
        replies = list(self.grid.send_and_receive([pushed for _, pushed in pairs], timeout=timeout))
        self._remember(pairs)
        restored = [self._restored(reply) for reply in replies]
        # Messages whose replies did not arrive in time would otherwise stay in memory.
        self.forget([message.metadata.message_id for message, _ in pairs])
        return restored

    def forget(self, message_ids: Iterable[str]) -> None:
        """Remove the references to messages; a later reply to one of them is not restored."""
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
                # The caller pulls replies by the id in its own message, as with Flower's grid.
                set_message_id(message, pushed.metadata.message_id)
                self._sent[pushed.metadata.message_id] = message

    def _restored(self, reply: Message) -> Message:
        sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
        if sent is None or reply.has_error():
            return reply
        try:
            self.incoming(sent, reply)
        # As if the participant had failed, so that recovery counts a restart and no refusal.
        except NotAnsweredError as error:
            return error_reply(sent, reply, CLIENT_RAISED, str(error))
        except ColearnError as error:
            return error_reply(sent, reply, REFUSED, str(error))
        return reply
