"""Every byte that the server receives in a run with dropouts, and an attacker who holds them.

The attacker has all messages in both directions, and knows the model that it looks for, so that it
can tell a hit. It tries every seed of a small range, which the test plants; a real one of 2^32
seeds takes hours in place of seconds.
"""

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from scipy import stats

from flwr_colearn import Averaging, CoLearn, Recovery, SecureAggregation, Transport, run
from flwr_colearn.records import view
from flwr_colearn.secure import keys, masks, member, unmasking
from flwr_colearn.secure.masks import Masks
from tests.flwr_colearn.secure.secure_faults import DroppingGrid, K, app_of, record_of, stage_of

SIZE = 20_000
MODEL = {"weight": np.zeros(SIZE, np.float32)}
SEEDS, WORDS = 2**12, 12


def step(k, server_round, arrays):
    """Participant k's model, in which every element is one of two numbers."""
    generator = np.random.default_rng([k, server_round])
    update = np.where(generator.integers(0, 2, SIZE) == 1, 0.25, -0.125)
    return {"weight": (arrays["weight"] + update).astype(np.float32)}


def updates():
    return [step(k, 1, MODEL)["weight"] for k in range(K)]


@pytest.fixture(scope="module")
def grid():
    """A run of two rounds: dropouts in every stage, and a repeated attempt."""
    drops = {
        (1, "share", 0): [0],
        (1, "mask", 0): [1, 2],
        (1, "mask", 1): [3],
        (1, "unmask", 1): [4],
        (2, "mask", 0): [0],
    }
    grid = DroppingGrid(app_of(step), drops=drops)
    transport = Transport(
        recovery=Recovery(max_restarts=1, pause=0.0),
        secure=SecureAggregation(timeout=0.2, masked_metrics=True),
    )
    strategy = Averaging(K, fraction_evaluate=0.0)
    run(strategy, grid, record_of(MODEL), 2, transport=transport)
    return grid


def vectors_of(grid):
    """All masked vectors that arrived, as words."""
    return [
        array.reshape(-1)
        for reply in grid.received
        for record in reply.content.array_records.values()
        for name, array in view(record).items()
        if name == "weight"
    ]


def test_arrays_arrive_in_one_stage_only_and_are_unsigned_words(grid):
    stages = set()
    by_id = {message.metadata.message_id: message for message in grid.sent}
    for reply in grid.received:
        if reply.content.array_records:
            stages.add(stage_of(by_id[reply.reply_to]))
            for record in reply.content.array_records.values():
                assert {a.dtype.kind for a in view(record).values()} == {"u"}
    assert stages == {"mask"}
    assert len(vectors_of(grid)) == 2 + 4 + 4  # of both attempts and of round 2


def test_masked_vectors_pass_a_chi_square_test(grid):
    for vector in vectors_of(grid):
        counts = np.bincount(np.frombuffer(vector.tobytes(), np.uint8), minlength=256)
        # Of ten vectors one fails a fair test at this level in 10^5 runs; a plain one is at 0.
        assert stats.chisquare(counts).pvalue > 1e-6
    plain = np.frombuffer(np.concatenate(updates()).tobytes(), np.uint8)
    assert stats.chisquare(np.bincount(plain, minlength=256)).pvalue < 1e-6


def test_masked_vectors_are_uncorrelated_with_the_models_and_with_each_other(grid):
    vectors = [vector.astype(np.float64) for vector in vectors_of(grid)]
    known = updates()
    # The standard error of a correlation of 20,000 pairs is 0.007.
    for index, vector in enumerate(vectors):
        for other in [*known, *vectors[index + 1 :]]:
            assert abs(np.corrcoef(vector, other)[0, 1]) < 0.04


def test_no_reply_holds_a_models_bytes_or_a_number_of_examples(grid):
    secrets = [update[:16].tobytes() for update in updates()]
    for reply in grid.received:
        for record in reply.content.values():
            if isinstance(record, ArrayRecord):
                data = b"".join(array.data for array in record.values())
                assert not any(secret in data for secret in secrets)
            else:
                assert not {"num-examples", "loss", "weight"} & set(record)


def test_of_no_participant_both_shares_arrive_in_one_attempt(grid):
    """With both the server could unmask the vector of one participant."""
    by_id = {message.metadata.message_id: message for message in grid.sent}
    asked = {}
    for reply in grid.received:
        sent = by_id[reply.reply_to]
        if stage_of(sent) != "unmask" or not reply.content:
            continue
        request = sent.content["colearn.secure"]
        key = request["round"], request["attempt"]
        asked.setdefault(key, set()).add(tuple(request["survivors"]))
        answer = reply.content["colearn.secure"]
        assert len(answer["seeds"]) == len(request["survivors"])
    assert {key: len(sets) for key, sets in asked.items()} == {(1, 1): 1, (2, 0): 1}


# The attacker -------------------------------------------------------------------------------------


def planted(key):
    """The bits that are left of a key, in the variant and in the attack on both."""
    return int.from_bytes(key[:2], "little") % SEEDS


class FlowersMasks(Masks):
    """The variant with Flower's generator, whose seeds have the planted range."""

    def __init__(self, pairs):
        self._pairs = list(pairs)

    def add_to(self, words):
        for key, sign in self._pairs:
            stream = flowers_stream(planted(key), words.size).astype(words.dtype)
            (np.add if sign > 0 else np.subtract)(words, stream, out=words)


def flowers_stream(seed, size):
    """The first words of Flower's generator for a seed of the planted range."""
    [stream] = pseudo_rand_gen(seed.to_bytes(4, "little"), 2**32, [(size,)])
    return stream


def our_stream(seed, size):
    """Our generator with a key of the planted range."""
    words = np.zeros(size, np.uint32)
    Masks([(seed.to_bytes(2, "little") + bytes(30), 1)]).add_to(words)
    return words.astype(np.int64)


class Attacker:
    """Holds all bytes of a run in which one vector arrived after its sender had dropped out.

    The survivors' shares give the private key of that sender, and so all masks but its own.
    """

    def __init__(self, grid):
        requests = {stage: [] for stage in ("share", "unmask")}
        answers = {stage: [] for stage in ("share", "unmask")}
        by_id = {message.metadata.message_id: message for message in grid.sent}
        for reply in grid.received:
            sent = by_id[reply.reply_to]
            if stage_of(sent) in answers and reply.content:
                requests[stage_of(sent)].append(sent.content["colearn.secure"])
                answers[stage_of(sent)].append(reply.content["colearn.secure"])
        [late] = grid.late_replies()
        self.sender = late.metadata.src_node_id - 1
        self.vector = view(late.content["colearn.secure.words"])["weight"][:WORDS]
        request = requests["share"][0]
        self.attempt = masks.Attempt(request["session"], 1, 0)
        self.public = request["keys"]
        number = keys.join([answer["private"][0] for answer in answers["unmask"]][:3])
        self.private = keys.key_of(number, self.public[self.sender])

    def own_key_of(self, secret):
        """The key of the sender's own mask, which only the test knows."""
        return self.attempt.own_key(secret, self.sender)

    def hits(self, kind, stream, seeds=SEEDS):
        """The seeds under which the vector is one of elements that a model may have."""
        left = self.vector.copy()
        pairs = []
        for j in {*range(K)} - {self.sender}:
            secret = keys.shared_secret(self.private, self.public[j])
            key = self.attempt.pair_key(secret, j, self.sender)
            pairs.append((key, -masks.sign_of(self.sender, j)))
        kind(pairs).add_to(left)
        words = np.array([0.25, -0.125]) / 8.0 * ((2**31 - 1) // K)
        found = []
        for seed in range(seeds):
            model = (left.astype(np.int64) - stream(seed, WORDS)).astype(np.int32)
            if np.abs(model[:, None] - words).min(axis=1).max() <= 1:
                found.append(seed)
        return found


def attacked(kind, monkeypatch):
    """An attacker of a run with these masks, and the secret of the late vector's own mask."""
    monkeypatch.setattr(member, "Masks", kind)
    monkeypatch.setattr(unmasking, "Masks", kind)
    grid = DroppingGrid(app_of(step), drops={(1, "mask", 0): [2]}, how="late")
    strategy = CoLearn(K, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0)
    secure = SecureAggregation(timeout=0.2)
    result = run(strategy, grid, record_of(MODEL), 1, transport=Transport(secure=secure))
    # The variant works as ours does: only what its masks are worth is another matter.
    expected = np.mean([updates()[k] for k in (0, 1, 3, 4)], axis=0)
    assert np.abs(result.arrays["weight"].numpy() - expected).max() < 1e-6
    secret = grid.contexts[3].state["colearn.secure.member"]["seed"]
    return Attacker(grid), secret


def test_the_attacker_finds_the_seed_and_the_model_under_flowers_generator(monkeypatch):
    attacker, secret = attacked(FlowersMasks, monkeypatch)
    assert attacker.hits(FlowersMasks, flowers_stream) == [planted(attacker.own_key_of(secret))]


@pytest.mark.parametrize("stream", [flowers_stream, our_stream])
def test_the_attacker_finds_nothing_under_ours(stream, monkeypatch):
    attacker, secret = attacked(Masks, monkeypatch)
    assert attacker.hits(Masks, stream) == []
    # With the whole key the same attack succeeds: it is the range of seeds that protects.
    key = attacker.own_key_of(secret)

    def whole(seed, size):
        words = np.zeros(size, np.uint32)
        Masks([(key, 1)]).add_to(words)
        return words.astype(np.int64)

    assert attacker.hits(Masks, whole, seeds=1) == [0]


def test_flowers_generator_has_seeds_of_28_bits_for_pairs():
    """The seed is the exclusive or of base64 text, in which four of 32 bits do not vary."""
    from flwr.supercore.primitives.asymmetric import generate_key_pairs

    from flwr_colearn._flwr import generate_shared_key

    seeds = []
    for _ in range(200):
        (one, _), (_, other) = generate_key_pairs(), generate_key_pairs()
        text, seed = generate_shared_key(one, other), 0
        for start in range(0, len(text), 4):
            seed ^= int.from_bytes(text[start : start + 4], "little")
        seeds.append(seed)
    varies = 0
    for seed in seeds:
        varies |= seed ^ seeds[0]
    assert bin(varies).count("1") <= 28


def test_the_server_makes_no_mask_but_to_unmask(monkeypatch):
    """Masks are made by every participant for its vector, and once a round by the server."""
    made = []
    before = Masks.__init__

    def count(self, pairs):
        pairs = list(pairs)
        made.append(len(pairs))
        before(self, pairs)

    monkeypatch.setattr(Masks, "__init__", count)
    grid = DroppingGrid(app_of(step), drops={(1, "mask", 0): [2]})
    secure = SecureAggregation(timeout=0.2)
    run(
        Averaging(K, fraction_evaluate=0.0),
        grid,
        record_of(MODEL),
        1,
        transport=Transport(secure=secure),
    )
    # Four vectors under 1 + 4 masks, and their sum under 4 own masks and 4 of the one that left.
    assert made == [5, 5, 5, 5, 8]
