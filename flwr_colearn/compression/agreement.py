"""The agreement of server and participants on codecs, version, round and reference model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord

from ..aggregation import ADD_THE_MOD
from ..errors import ColearnError, expected
from ..records import to_record
from ..roles import Arrays
from .codecs import BFloat16, Codec, Float16, Uncompressed, codec_named

VERSION = 3
"""The version of the agreement, which must be the same on both sides."""

AGREEMENT = "colearn.compression"
"""The key of the ConfigRecord with the codecs that a message requests and a reply confirms."""

REFERENCE = "colearn.reference"
"""The key in a participant's ``context.state`` for the reference model of differences, where a
strategy leaves the models with the participants."""

LOCAL_REFERENCE = "local-reference"
"""Entry of the agreement: the difference is to `REFERENCE`, not to the model in the message."""

AVERAGE_OF = "average-of"
"""Entry of the agreement: the model in the message is the average of this round's replies."""


@dataclass(frozen=True)
class Compression:
    """The codecs of both directions, chosen on the server and stated in every message.

    Unless both directions are ``Uncompressed()``, every ClientApp needs `participant_mod`. Replies
    of a ClientApp without it, or with another version of it, are refused with that reason.

    Parameters
    ----------
    up : Codec, default Uncompressed()
        The codec from participants to the server: ``Uncompressed()``, ``Float16()``,
        ``BFloat16()`` or ``Int8()``.
    down : Codec, default Uncompressed()
        The codec from the server to participants: any but ``Int8``.

    Raises
    ------
    ColearnError
        If an argument is not a codec, or `down` is ``Int8``, since participants need not store a
        reference model for a difference.

    Examples
    --------
    >>> from flwr_colearn import Float16, Int8
    >>> str(Compression(up=Int8(), down=Float16()))
    'int8 up, float16 down'
    """

    up: Codec = field(default_factory=Uncompressed)
    down: Codec = field(default_factory=Uncompressed)

    def __post_init__(self) -> None:
        for side, codec in (("up", self.up), ("down", self.down)):
            if not isinstance(codec, Codec):
                raise expected(f"Compression({side}=...)", "a codec such as Float16()", codec)
        if self.down.differential:
            wanted = "a codec of whole models, since participants keep none between rounds"
            raise expected("Compression(down=...)", wanted, str(self.down))

    def __str__(self) -> str:
        """Return the codecs of both directions."""
        return f"{self.up} up, {self.down} down"

    @property
    def is_plain(self) -> bool:
        """Whether neither direction is compressed."""
        return isinstance(self.up, Uncompressed) and isinstance(self.down, Uncompressed)

    @property
    def keeps_signs(self) -> bool:
        """Whether no number of a participant's model changes its sign on the way to the server."""
        # A difference is rounded in steps that may be larger than the number itself.
        return isinstance(self.up, Uncompressed | Float16 | BFloat16)

    def received(self, model: Arrays) -> Arrays:
        """Return a model as participants decode it; a second encoding would not change it."""
        if isinstance(self.down, Uncompressed):
            return model
        return self.down.encode(to_record(dict(model)))[1]

    def request(self) -> dict[str, str | int]:
        """Return the entries of every message's agreement."""
        return {"version": VERSION, "up": str(self.up), "down": str(self.down)}


def as_compression(value: object) -> Compression:
    """Return `value` if it is a Compression.

    Raises
    ------
    ColearnError
        If `value` is anything else.
    """
    if isinstance(value, Compression):
        return value
    raise expected(
        "compression", "a Compression, such as Compression(up=Int8(), down=Float16())", value
    )


def check_agreed(said: ConfigRecord | None, request: Mapping[str, object]) -> None:
    """Raise a ColearnError unless a reply confirms that it is encoded as `request` demands."""
    if said is None:
        raise ColearnError(
            f"reply: expected arrays sent as {request['up']} by flwr_colearn.participant_mod, "
            "found none; " + ADD_THE_MOD
        )
    if dict(said) != dict(request):
        raise expected("reply", f"arrays sent as asked for, {dict(request)}", dict(said))


def agreed_codecs(request: ConfigRecord) -> tuple[Codec, Codec]:
    """Return the codecs that the server requests, up and down.

    Raises
    ------
    ColearnError
        If the server has another version, or a codec that is unknown at the participant.
    """
    try:
        if request.get("version") != VERSION:
            raise expected("compression", f"version {VERSION}", request.get("version"))
        return codec_named(request.get("up")), codec_named(request.get("down"))
    except ColearnError as error:
        raise ColearnError(
            f"{error}; is flwr-colearn the same version on the server and at this participant?"
        ) from None
