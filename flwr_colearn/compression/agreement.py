"""What server and participants must share of the compression: codecs, version, round, reference."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord

from ..errors import ColearnError, expected
from ..records import to_record
from ..roles import Arrays
from .codecs import Codec, Uncompressed, codec_named

VERSION = 3
"""Version of the agreement; both sides must have the same."""

AGREEMENT = "colearn.compression"
"""Key of the ConfigRecord in which the server asks for codecs, and a reply says it used them."""

REFERENCE = "colearn.reference"
"""Key in a participant's ``context.state`` of the model that differences are to, where a strategy
leaves the models with the participants."""

LOCAL_REFERENCE = "local-reference"
"""Entry of the agreement: the difference is to `REFERENCE`, not to the model in the message."""

AVERAGE_OF = "average-of"
"""Entry of the agreement: the model in the message is the average of this round's replies."""

ADD_THE_MOD = "add participant_mod to the ClientApp's mods: ClientApp(mods=[participant_mod])"


@dataclass(frozen=True)
class Compression:
    """How models travel: the server's choice, which participants learn with every message.

    Unless both directions are ``Uncompressed()``, every ClientApp needs `participant_mod`; replies
    of one without it, or with another version of it, are refused with that reason.

    Parameters
    ----------
    up : Codec, default Uncompressed()
        From participants to the server: ``Uncompressed()``, ``Float16()``, ``BFloat16()`` or
        ``Int8()``.
    down : Codec, default Uncompressed()
        From the server to participants: any but ``Int8``.

    Raises
    ------
    ColearnError
        If one is no codec, or `down` is ``Int8``: participants need not keep a model to which a
        difference could be sent.

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
        """Whether nothing is compressed in either direction."""
        return isinstance(self.up, Uncompressed) and isinstance(self.down, Uncompressed)

    def received(self, model: Arrays) -> Arrays:
        """Return a model as participants have it after it was sent; sent again, it stays so."""
        if isinstance(self.down, Uncompressed):
            return model
        return self.down.encode(to_record(dict(model)))[1]

    def request(self) -> dict[str, str | int]:
        """Return what every message says of the compression."""
        return {"version": VERSION, "up": str(self.up), "down": str(self.down)}


def as_compression(value: object) -> Compression:
    """Return `value` if it is a Compression.

    Raises
    ------
    ColearnError
        If it is anything else.
    """
    if isinstance(value, Compression):
        return value
    raise expected(
        "compression", "a Compression, such as Compression(up=Int8(), down=Float16())", value
    )


def check_agreed(said: ConfigRecord | None, request: Mapping[str, object]) -> None:
    """Raise a ColearnError unless a reply says that it was sent as `request` asks for."""
    if said is None:
        raise ColearnError(
            f"reply: expected arrays sent as {request['up']} by flwr_colearn.participant_mod, "
            "found no word of it; " + ADD_THE_MOD
        )
    if dict(said) != dict(request):
        raise expected("reply", f"arrays sent as asked for, {dict(request)}", dict(said))


def agreed_codecs(request: ConfigRecord) -> tuple[Codec, Codec]:
    """Return the codecs that the server asks for, up and down.

    Raises
    ------
    ColearnError
        If the server has another version, or a codec that is unknown here.
    """
    try:
        if request.get("version") != VERSION:
            raise expected("compression", f"version {VERSION}", request.get("version"))
        return codec_named(request.get("up")), codec_named(request.get("down"))
    except ColearnError as error:
        raise ColearnError(
            f"{error}; is flwr-colearn the same version on the server and here?"
        ) from None
