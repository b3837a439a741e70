"""Models travel in fewer bytes: codecs, and what both sides must agree on.

A user turns it on in one place, ``CoLearn(compression=Compression(up=Int8(), down=Float16()))`` or
``Transport(compression=...)``; participants learn it from the messages, through
`flwr_colearn.participant_mod`.
"""

from .agreement import (
    AGREEMENT,
    AVERAGE_OF,
    LOCAL_REFERENCE,
    REFERENCE,
    Compression,
    as_compression,
)
from .client import compressed
from .codecs import BFloat16, Codec, Float16, Int8, PackedCodec, Uncompressed, codec_named, register
from .grid import CompressionGrid

__all__ = [
    "AGREEMENT",
    "AVERAGE_OF",
    "LOCAL_REFERENCE",
    "REFERENCE",
    "BFloat16",
    "Codec",
    "Compression",
    "CompressionGrid",
    "Float16",
    "Int8",
    "PackedCodec",
    "Uncompressed",
    "as_compression",
    "codec_named",
    "compressed",
    "register",
]
