"""Job: a message for a worker process; Batch: messages that were pushed together."""

import uuid
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory

from flwr.app import Error, Message

from .._flwr import CLIENT_CRASHED, set_message_id
from ..records import config_of, number_in
from .parcels import Parcel


@dataclass
class Batch:
    """Messages that were pushed together, in one segment, in which common arrays are once."""

    number: int
    segment: SharedMemory
    left: int


@dataclass
class Job:
    """A message on its way to a participant, until there is a reply."""

    message: Message
    parcel: Parcel
    batch: Batch
    deaths: int = 0
    began: float = 0.0

    @property
    def message_id(self) -> str:
        """The message's id."""
        return self.message.metadata.message_id

    @property
    def node_id(self) -> int:
        """The participant."""
        return self.message.metadata.dst_node_id

    @property
    def limit(self) -> float:
        """The seconds that the participant may take; 0 for any number."""
        return number_in(config_of(self.message.content), "time-limit")

    def failed(self, reason: str) -> Message:
        """Return an error reply."""
        reply = Message(Error(CLIENT_CRASHED, reason), reply_to=self.message)
        set_message_id(reply, str(uuid.uuid4()))
        return reply
