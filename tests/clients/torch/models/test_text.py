import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from clients.torch.models.text import BiGRU, Capsules, WordMean, bigru_small, routed, squash

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

VECTORS = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
VECTORS[0] = 0
EVERY = [BiGRU, bigru_small, Capsules, WordMean]
every = pytest.mark.parametrize("build", EVERY, ids=lambda build: build.__name__)


def words(n=3, length=12, seed=0):
    """Comments of 1, 2, 3 ... words."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 50, (n, length), generator=generator)
    return numbers * (torch.arange(length) <= torch.arange(n)[:, None])


def gru(inputs, units):
    return 2 * 3 * (inputs * units + units * units + 2 * units)  # three gates, two biases each


@pytest.mark.parametrize(
    ("build", "dimension", "layers"),
    [
        (BiGRU, 300, gru(300, 128) + 4 * 128 * 6 + 6),
        (bigru_small, 64, gru(64, 32) + 4 * 32 * 6 + 6),
        (WordMean, 64, 64 * 6 + 6),
        (Capsules, 300, 3 * 300 * 32 * 8 + 32 * 8 + 32 * 6 * 8 * 16),
    ],
)
def test_parameters_by_formula(build, dimension, layers):
    model = build(vocabulary=50)
    assert sum(p.numel() for p in model.parameters()) == 50 * dimension + layers


@every
def test_logits_for_every_label_and_gradients_for_every_parameter(build):
    torch.manual_seed(0)
    model = build(vocabulary=50, num_labels=4)
    logits = model(words(8))
    assert (logits.shape, logits.dtype) == ((8, 4), torch.float32)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(8, 4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


@every
def test_padding_does_not_change_the_logits(build):
    torch.manual_seed(0)
    model = build(vocabulary=50).eval()
    short, longer = words(), torch.nn.functional.pad(words(), (0, 30))
    torch.testing.assert_close(model(short), model(longer), rtol=1e-5, atol=1e-5)
    # Nor do the other comments of the batch.
    torch.testing.assert_close(model(short)[:1], model(short[:1, :1]), rtol=1e-5, atol=1e-5)
    assert not torch.equal(model(short)[0], model(short)[1])


@every
def test_a_comment_without_words_has_finite_logits_and_gradients(build):
    model = build(vocabulary=50)
    logits = model(torch.zeros(2, 5, dtype=torch.int64))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every
def test_half_precision_gives_nearly_the_same_logits(build):
    torch.manual_seed(0)
    model = build(vocabulary=50).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(words())
    torch.testing.assert_close(half.float(), model(words()), rtol=0.05, atol=0.05)


@every
def test_vectors_that_were_read_neither_travel_nor_train(build):
    model = build(vocabulary=50, vectors=VECTORS)
    assert not [name for name in model.state_dict() if name.startswith("embedding")]
    assert all(not name.startswith("embedding") for name, _ in model.named_parameters())
    looked_up = model.embedding(torch.tensor([[3, 0]]))
    np.testing.assert_array_equal(looked_up[0], VECTORS[[3, 0]])
    assert model(words()).shape == (3, 6)


def test_spatial_dropout_drops_dimensions_in_all_words_alike():
    torch.manual_seed(0)
    model = BiGRU(vocabulary=50, dropout=0.5)
    embedded = []
    model.gru.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0].data))
    comment = torch.full((1, 9), 5)
    model(comment)
    expected = model.embedding.weight[5].detach()
    dropped = embedded[0][0] == 0
    assert 0.3 < dropped.float().mean() < 0.7
    for word in embedded[0]:
        torch.testing.assert_close(word, torch.where(dropped, 0, 2 * expected))


def test_word_mean_against_numpy():
    model = WordMean(50, VECTORS)
    weight, bias = (each.detach().numpy() for each in (model.linear.weight, model.linear.bias))
    comments = [[7, 3, 3], [41], []]
    padded = torch.tensor([row + [0] * (4 - len(row)) for row in comments])
    means = [VECTORS[row].mean(0) if row else np.zeros(7) for row in comments]
    np.testing.assert_allclose(
        model(padded).detach().numpy(), np.stack(means) @ weight.T + bias, rtol=1e-5, atol=1e-6
    )


def test_bigru_against_the_layers_applied_one_comment_at_a_time():
    torch.manual_seed(0)
    model = BiGRU(vocabulary=50, units=5, dimension=6).eval()
    comments = words()
    for row, count in enumerate((1, 2, 3)):
        states = model.gru(model.embedding(comments[row, :count])[None])[0][0]
        pooled = torch.cat([states.mean(0), states.max(0).values])
        torch.testing.assert_close(model(comments)[row], model.linear(pooled))


# Capsules


def squashed(vector):
    length = np.linalg.norm(vector)
    return vector * length / (1 + length**2) if length else vector


def slow_routing(capsules, weights, iterations):
    """Procedure 1 of Sabour et al. (2017) for one example, by loops; also the last couplings."""
    places, types, _ = capsules.shape
    classes = weights.shape[1]
    logits = np.zeros((places, types, classes))
    for _ in range(iterations):
        couplings = softmax(logits, axis=-1)
        sums = np.zeros((classes, weights.shape[-1]))
        for p, t, j in np.ndindex(places, types, classes):
            sums[j] += couplings[p, t, j] * (capsules[p, t] @ weights[t, j])
        outputs = [squashed(s) for s in sums]
        for p, t, j in np.ndindex(places, types, classes):
            logits[p, t, j] += capsules[p, t] @ weights[t, j] @ outputs[j]
    return sums, couplings


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 5, 3, 4)), rng.standard_normal((3, 6, 4, 7))


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_routing_against_the_published_procedure(problem, iterations):
    capsules, weights = problem
    found = routed(*map(torch.from_numpy, problem), iterations)
    for row in range(2):
        expected, _ = slow_routing(capsules[row], weights, iterations)
        np.testing.assert_allclose(found[row], expected, rtol=1e-10)


def test_gradients_flow_through_the_last_iteration_only(problem):
    capsules, weights = problem
    tensors = [torch.from_numpy(array).requires_grad_() for array in problem]
    routed(*tensors, 3).sum().backward()
    # With couplings that do not depend on the weights, d sum(s) / d W[t, j] = sum_p c_p u_p, for
    # each of its columns.
    expected = np.zeros_like(weights)
    for row in range(2):
        _, couplings = slow_routing(capsules[row], weights, 3)
        expected += np.einsum("ptj,ptd->tjd", couplings, capsules[row])[..., None]
    np.testing.assert_allclose(tensors[1].grad, expected, rtol=1e-10)


def test_squash():
    torch.testing.assert_close(squash(torch.tensor([3.0, 4.0])), torch.tensor([15.0, 20.0]) / 26)
    vectors = torch.diag(torch.tensor([0.1, 1, 1e4], dtype=torch.float64))
    lengths = squash(vectors).norm(dim=-1)
    expected = torch.tensor([0.01 / 1.01, 0.5, 1 - 1e-8], dtype=torch.float64)
    torch.testing.assert_close(lengths, expected, rtol=1e-8, atol=0)


def test_squash_at_zero_has_finite_gradients():
    zero = torch.zeros(2, 8, requires_grad=True)
    assert torch.equal(squash(zero), torch.zeros(2, 8))
    squash(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_the_capsule_nets_logits_are_those_of_the_class_capsules_lengths():
    torch.manual_seed(0)
    model = Capsules(vocabulary=50)
    comments = words().numpy()
    for row, count in enumerate((1, 2, 3)):
        kernel, bias = (p.detach().numpy() for p in (model.primary.weight, model.primary.bias))
        vectors = model.embedding.weight.detach().numpy()[comments[row, :count]]
        padded = np.concatenate([np.zeros((1, 300)), vectors, np.zeros((1, 300))])
        windows = np.stack([padded[p : p + 3] for p in range(count)])
        primary = (np.einsum("pkc,ock->po", windows, kernel) + bias).reshape(count, 32, 8)
        primary = np.apply_along_axis(squashed, -1, primary)
        sums, _ = slow_routing(primary, model.predictions.detach().numpy(), 3)
        lengths = [np.linalg.norm(squashed(s)) for s in sums]
        logits = model(torch.from_numpy(comments))[row].detach()
        np.testing.assert_allclose(expit(logits.numpy()), lengths, rtol=1e-4)


def test_predictions_of_4800_capsules_are_never_formed():
    """Whole, they would be 233 MB for these 128 comments; all that is kept is less than half."""
    model = Capsules(vocabulary=50)
    kept = []
    comments = torch.full((128, 150), 5)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append((tensor.data_ptr(), tensor.nbytes)) or tensor, lambda t: t
    ):
        capsules = torch.zeros(128, 150, 32, 8, requires_grad=True)
        routed(capsules, model.predictions, 3)
    assert sum(dict(kept).values()) < 128 * 4800 * 6 * 16 * 4 / 2
    assert model(comments[:2]).shape == (2, 6)
