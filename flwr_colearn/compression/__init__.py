"""Compression of models in messages: the codecs, and the agreement of both sides on them.

The server alone configures it, by ``CoLearn(compression=Compression(up=Int8(), down=Float16()))``
or ``Transport(compression=...)``. The messages contain the configuration, which
`flwr_colearn.participant_mod` reads at the participants.
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
