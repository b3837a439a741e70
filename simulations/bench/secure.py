"""Benchmark of secure aggregation: the time of masks, and the bytes and seconds of a round.

A participant adds K masks to its model: one of its own and K - 1 with the others. The table has the
milliseconds of one mask and MiB, and their ratio to the keystream alone, which is the encryption of
zeros by AES-256 in counter mode; both are times of the processor, in one thread. A round is one of
CoLearn in process, without training, with and without secure aggregation; its bytes are those of
one participant, and the small stages are counted in both directions. The limits are a ratio of 1.5
for the time, and of 1.1 for the bytes upwards besides the small stages.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import CoLearn, InProcessGrid, SecureAggregation, Transport, participant_mod
from flwr_colearn.records import to_record, view
from flwr_colearn.roles import NDArray
from flwr_colearn.secure import Masks

REPEATS = 5
MEBIBYTE = 1 << 20


def model_of(mebibytes: int) -> dict[str, NDArray]:
    """Return a model of float32 of this size, in 16 arrays for each MiB up to 64 arrays."""
    count = min(16 * mebibytes, 64)
    generator = np.random.default_rng(0)
    size = mebibytes * MEBIBYTE // 4 // count
    return {f"layer-{i}": generator.normal(0, 0.1, size).astype(np.float32) for i in range(count)}


def time_masks(model: dict[str, NDArray], masks: int) -> tuple[float, float]:
    """Return the median seconds of masking a model, and those of so many keystreams alone."""
    words = [array.view(np.uint32).copy() for array in model.values()]
    masked, keystream = [], []
    for repeat in range(REPEATS):
        pairs = [(bytes([repeat, i]) + bytes(30), 1 if i % 2 else -1) for i in range(masks)]
        started = time.process_time()
        each = Masks(pairs)
        for array in words:
            each.add_to(array)
        masked.append(time.process_time() - started)
        keystream.append(sum(time_keystream(key, words) for key, _ in pairs))
    return statistics.median(masked), statistics.median(keystream)


def time_keystream(key: bytes, words: list[NDArray]) -> float:
    """Return the seconds of the keystream for these arrays, without adding it to anything."""
    largest = max(array.nbytes for array in words)
    zeros, room = bytes(largest), bytearray(largest + 16)
    started = time.process_time()
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    for array in words:
        stream.update_into(memoryview(zeros)[: array.nbytes], room)
    return time.process_time() - started


def app() -> ClientApp:
    """Return participants that reply with a model near the one sent."""
    client = ClientApp(mods=[participant_mod])

    @client.train()
    def train(message: Message, context: Context) -> Message:
        sent = message.content["arrays"]
        assert isinstance(sent, ArrayRecord)
        site = np.float32(int(context.node_config["partition-id"]) / 1000)
        arrays = to_record({name: array + site for name, array in view(sent).items()})
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return client


def round_of(model: dict[str, NDArray], k: int, transport: Transport) -> dict[str, float]:
    """Return the bytes of one participant and the seconds of the second of two rounds."""
    strategy = CoLearn(k, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0)
    strategy.start(transport.connect(InProcessGrid(app(), k)), to_record(model), num_rounds=2)
    record = strategy.history.records[1]
    assert record.bytes_up is not None
    assert record.control_up is not None
    assert record.control_down is not None
    return {
        "up": record.bytes_up / k,
        "control": (record.control_up + record.control_down) / k,
        "seconds": record.seconds,
    }


def measured(k: int, mebibytes: int) -> dict[str, Any]:
    """Return the table's row for K participants and a model of this size."""
    model = model_of(mebibytes)
    masked, keystream = time_masks(model, k)
    plain = round_of(model, k, Transport())
    secure = round_of(model, k, Transport(secure=SecureAggregation()))
    return {
        "participants": k,
        "MiB": mebibytes,
        "ms per mask and MiB": round(1000 * masked / k / mebibytes, 3),
        "keystream ms": round(1000 * keystream / k / mebibytes, 3),
        "ratio": round(masked / keystream, 2),
        "bytes up, ratio": round(secure["up"] / plain["up"], 3),
        "small stages, bytes": round(secure["control"] - plain["control"]),
        "plain round s": round(plain["seconds"], 2),
        "secure round s": round(secure["seconds"], 2),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the benchmark's results."""
    rows = [measured(k, size) for size in options.mebibytes for k in options.participants]
    return {"repeats": REPEATS, "rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's own options."""
    parser.add_argument("--participants", type=int, nargs="+", default=[5, 20], metavar="K")
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[1, 100], metavar="SIZE")
