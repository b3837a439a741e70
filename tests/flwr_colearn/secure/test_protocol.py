"""The protocol without messages: any dropouts, and requests that would tell a single model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_colearn import ColearnError
from flwr_colearn.secure import keys
from flwr_colearn.secure.masks import Attempt
from flwr_colearn.secure.member import Member
from flwr_colearn.secure.unmasking import Unmasking

ATTEMPT = Attempt("session", 1, 0)


class Protocol:
    """Participants whose vectors are random, and the server."""

    def __init__(self, k, threshold, attempt=ATTEMPT):
        # Through their saved form, as between two messages.
        self.members = [Member.from_config(Member(attempt).to_config()) for _ in range(k)]
        self.public, self.ciphers = zip(*(m.public_keys for m in self.members), strict=True)
        self.server = Unmasking(attempt, threshold, self.public)
        self.threshold = threshold
        self.sealed = {}
        generator = np.random.default_rng(0)
        self.vectors = [generator.integers(0, 2**32, 50, np.uint32) for _ in range(k)]
        self.arrived = {}

    def share(self, indices):
        for index in indices:
            self.sealed[index], self.server.commitments[index] = self.members[index].share(
                index, self.public, self.ciphers, self.threshold
            )

    def sealed_for(self, index):
        return {j: shares[index] for j, shares in self.sealed.items() if j != index}

    def mask(self, indices):
        for index in indices:
            member = Member.from_config(self.members[index].to_config())
            vector = self.vectors[index].copy()
            member.mask(self.sealed_for(index)).add_to(vector)
            self.members[index], self.arrived[index] = member, vector

    def unmask(self, indices):
        survivors = sorted(self.arrived)
        for index in indices:
            self.server.add(survivors, *self.members[index].unmask(survivors))
        total = sum(self.arrived.values(), np.zeros(50, np.uint32))
        self.server.masks(survivors).add_to(total)
        return total


def protocol_with_vectors(k=5, threshold=3):
    protocol = Protocol(k, threshold)
    protocol.share(range(k))
    protocol.mask(range(k))
    return protocol


@settings(max_examples=12)
@given(st.data())
def test_the_sum_is_that_of_the_participants_whose_vectors_arrived(data):
    k = data.draw(st.integers(3, 7))
    threshold = data.draw(st.integers(max(3, k // 2 + 1), k))

    def stayed(indices):
        return data.draw(
            st.lists(st.sampled_from(indices), min_size=threshold, unique=True).map(sorted)
        )

    sharing = stayed(list(range(k)))
    sending = stayed(sharing)
    answering = stayed(sending)
    protocol = Protocol(k, threshold)
    protocol.share(sharing)
    protocol.mask(sending)
    # Those that drop out have masks in the others' vectors: their own are made, and never arrive.
    total = protocol.unmask(answering)
    expected = sum((protocol.vectors[i] for i in sending), np.zeros(50, np.uint32))
    assert np.array_equal(total, expected)


def test_a_vector_alone_and_a_sum_of_too_few_stay_masked():
    protocol = protocol_with_vectors()
    survivors = list(range(5))
    for index in (0, 1):
        protocol.server.add(survivors, *protocol.members[index].unmask(survivors))
    with pytest.raises(ColearnError, match="shares of participant 0: expected 3, found 2"):
        protocol.server.masks(survivors)
    for vector, sent in zip(protocol.vectors, protocol.arrived.values(), strict=True):
        assert not (vector == sent).any()


def test_two_attempts_hide_the_same_vector_under_unrelated_masks():
    one, other = Protocol(3, 3), Protocol(3, 3, Attempt("session", 1, 1))
    for protocol in (one, other):
        protocol.share(range(3))
        protocol.mask(range(3))
    assert np.array_equal(one.vectors[0], other.vectors[0])
    assert not (one.arrived[0] == other.arrived[0]).any()


# What a participant does not answer ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a.update(threshold=2), "threshold: expected at least 3"),
        (lambda a: a.update(threshold=6), "threshold: expected at least 3"),
        (lambda a: a.update(public=a["public"][:2], ciphers=a["ciphers"][:2]), "threshold"),
        (lambda a: a.update(index=1), "participant's own at its place, found 1"),
        (lambda a: a.update(index=-5), "participant's own at its place"),
        (lambda a: a.update(public=[*a["public"][:4], a["public"][0]]), "found 'some twice'"),
        (lambda a: a.update(ciphers=a["public"]), "found 'some twice'"),
        (lambda a: a.update(public=[*a["public"][:4], b"no key"]), None),
        (lambda a: a.update(ciphers=[*a["ciphers"][:4], b"no key"]), "public key: expected one"),
    ],
)
def test_keys_that_would_hide_nothing_are_refused(change, match):
    protocol = Protocol(5, 3)
    arguments = {
        "index": 0,
        "public": list(protocol.public),
        "ciphers": list(protocol.ciphers),
        "threshold": 3,
    }
    change(arguments)
    if match is None:  # it is found out with the masks
        protocol.members[0].share(**arguments)
        return
    with pytest.raises(ColearnError, match=match):
        protocol.members[0].share(**arguments)


def test_a_threshold_of_half_the_participants_is_refused():
    protocol = Protocol(6, 3)
    with pytest.raises(ColearnError, match="more than half, of 6"):
        protocol.share([0])


def test_a_second_vector_is_refused():
    protocol = protocol_with_vectors()
    with pytest.raises(ColearnError, match="expected 'mask' after 'share', found it after 'mask'"):
        protocol.mask([0])


def test_shares_are_given_once_only():
    protocol = protocol_with_vectors()
    with pytest.raises(ColearnError, match="expected 'share' after 'keys'"):
        protocol.share([0])


def test_there_is_no_answer_before_the_vector():
    protocol = Protocol(5, 3)
    protocol.share(range(5))
    with pytest.raises(ColearnError, match="expected 'unmask' after"):
        protocol.members[0].unmask([0, 1, 2])


@pytest.mark.parametrize(
    ("survivors", "match"),
    [
        ([0, 1], "at least 3 participants, found 2"),
        ([1, 2, 3], "survivors: expected this participant"),
        ([0, 1, 2, 9], "survivors: expected this participant"),
    ],
)
def test_shares_of_too_few_or_of_others_are_refused(survivors, match):
    protocol = protocol_with_vectors()
    with pytest.raises(ColearnError, match=match):
        protocol.members[0].unmask(survivors)


def test_the_same_answer_may_be_repeated_and_another_one_never_follows():
    protocol = protocol_with_vectors()
    member = protocol.members[0]
    first = member.unmask([0, 1, 2, 3])
    member = Member.from_config(member.to_config())
    assert member.unmask([3, 2, 1, 0]) == first
    for others in ([0, 1, 2, 3, 4], [0, 1, 2]):
        with pytest.raises(ColearnError, match="those of the first request"):
            member.unmask(others)


def test_of_nobody_both_shares_are_given():
    protocol = protocol_with_vectors()
    survivors = [0, 1, 2, 3]
    seeds, private = protocol.members[0].unmask(survivors)
    assert len(seeds) == 4
    assert len(private) == 1


def test_no_two_sets_of_survivors_can_both_be_unmasked():
    """More than half must answer, so two sets have an honest participant in common."""
    protocol = protocol_with_vectors()
    answers = []
    for survivors in ([0, 1, 2], [2, 3, 4]):
        answered = 0
        for index in survivors:
            try:
                protocol.members[index].unmask(survivors)
                answered += 1
            except ColearnError:
                pass
        answers.append(answered >= 3)
    assert answers == [True, False]


@pytest.mark.parametrize("way", ["another sender", "another receiver", "another attempt", "bytes"])
def test_shares_of_another_way_or_attempt_are_refused(way):
    protocol = Protocol(5, 3)
    protocol.share(range(5))
    sealed = protocol.sealed_for(0)
    if way == "another sender":
        sealed[1], sealed[2] = sealed[2], sealed[1]
    elif way == "another receiver":
        sealed[1] = protocol.sealed[1][2]
    elif way == "another attempt":
        key = keys.shared_secret(protocol.members[1].private[1], protocol.ciphers[0])
        sealed[1] = keys.seal(key, Attempt("session", 1, 1), (1, 0), (b"x", b"y"))
    else:
        sealed[1] = b"anything"
    with pytest.raises(ColearnError, match="shares of participant 1: expected those of this"):
        protocol.members[0].mask(sealed)


def test_fewer_senders_than_the_threshold_get_no_vector():
    protocol = Protocol(5, 3)
    protocol.share([0, 1])
    with pytest.raises(ColearnError, match="at least 3 participants, found 2"):
        protocol.mask([0])


# What the server does not accept ------------------------------------------------------------------


def test_a_wrong_share_does_not_become_a_wrong_average():
    protocol = protocol_with_vectors()
    del protocol.arrived[4]
    survivors = [0, 1, 2, 3]
    for index in survivors:
        seeds, private = protocol.members[index].unmask(survivors)
        if index == 1:
            seeds[2] = seeds[2][:4] + bytes(len(seeds[2]) - 4)
        protocol.server.add(survivors, seeds, private)
    with pytest.raises(ColearnError, match="shares of participant 2: expected those of its secret"):
        protocol.server.masks(survivors)


def test_a_wrong_share_of_a_private_key_is_found_out():
    protocol = protocol_with_vectors()
    del protocol.arrived[4]
    survivors = [0, 1, 2, 3]
    for index in survivors:
        seeds, private = protocol.members[index].unmask(survivors)
        if index == 1:
            private[0] = private[0][:4] + bytes(len(private[0]) - 4)
        protocol.server.add(survivors, seeds, private)
    with pytest.raises(ColearnError, match="shares of participant 4: expected those of its secret"):
        protocol.server.masks(survivors)


@pytest.mark.parametrize("which", ["own mask", "private key"])
def test_shares_of_another_secret_are_found_out(which):
    """They fit together, so only the commitment and the public key tell."""
    protocol = protocol_with_vectors()
    del protocol.arrived[4]
    survivors, others = [0, 1, 2, 3], keys.split(bytes(31) + b"1", 3, 5)
    numbers = keys.split(keys.number_of(keys.new_key()), 3, 5)
    for index in survivors:
        seeds, private = protocol.members[index].unmask(survivors)
        if which == "own mask":
            seeds[2] = others[index]
        else:
            private[0] = numbers[index]
        protocol.server.add(survivors, seeds, private)
    participant = 2 if which == "own mask" else 4
    with pytest.raises(ColearnError, match=f"shares of participant {participant}: expected those"):
        protocol.server.masks(survivors)


def test_another_number_of_shares_is_refused():
    protocol = protocol_with_vectors()
    seeds, private = protocol.members[0].unmask([0, 1, 2, 3, 4])
    with pytest.raises(ColearnError, match="5 of own masks and 0 of private keys"):
        protocol.server.add([0, 1, 2, 3, 4], seeds[:4], private)
