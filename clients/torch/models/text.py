"""PyTorch networks for text, from word numbers [N, length] (0: padding) to logits [N, labels]."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from clients.tasks.words import PAD
from clients.trainer import NDArray

TYPES, PRIMARY, CLASS = 32, 8, 16
"""The paper's number of types of primary capsules, and dimensions of primary and class capsules."""
ROUTINGS = 3
"""The number of routing iterations (Sabour, Frosst and Hinton, 2017)."""


class FrozenEmbedding(nn.Module):
    """An embedding that is neither trained nor exchanged, since every site reads the same file.

    Parameters
    ----------
    vectors : array of float32, [vocabulary, dimension]
        The word vectors.
    """

    def __init__(self, vectors: NDArray) -> None:
        super().__init__()
        self.embedding_dim = vectors.shape[1]
        # Not persistent: the buffer moves with the model's device, but is not in the state dict.
        self.register_buffer("vectors", torch.from_numpy(vectors), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        """Map [N, length] to [N, length, dimension]."""
        return nn.functional.embedding(words, self.vectors)  # type: ignore[arg-type]


def embedding(
    vocabulary: int, dimension: int, vectors: NDArray | None
) -> nn.Embedding | FrozenEmbedding:
    """Return an embedding with these vectors, or a learned one without them."""
    if vectors is not None:
        return FrozenEmbedding(vectors)
    return nn.Embedding(vocabulary, dimension, padding_idx=PAD)


class BiGRU(nn.Module):
    """Embedding, spatial dropout, bidirectional GRU, average and maximum over words, linear.

    Padding is excluded everywhere; a comment without words counts as one word of padding. There are
    333,318 parameters besides those of a learned embedding.

    Parameters
    ----------
    vocabulary : int
        The number of word numbers, padding and unknown words included.
    vectors : array, [vocabulary, dimension], optional
        The word vectors; by default the embedding is learned.
    num_labels : int, default 6
        The number of labels.
    dimension : int, default 300
        The dimension of a learned embedding.
    units : int, default 128
        The number of GRU units in each direction.
    dropout : float, default 0.2
        The share of the embedding's dimensions that are dropped, the same in all of a comment's
        words.
    """

    def __init__(
        self,
        vocabulary: int,
        vectors: NDArray | None = None,
        num_labels: int = 6,
        dimension: int = 300,
        units: int = 128,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.embedding = embedding(vocabulary, dimension, vectors)
        self.dropout = nn.Dropout1d(dropout)
        width = self.embedding.embedding_dim
        self.gru = nn.GRU(width, units, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(4 * units, num_labels)

    def forward(self, words: Tensor) -> Tensor:
        """Map [N, length] to logits [N, num_labels]."""
        lengths = (words != PAD).sum(1).clamp(min=1)
        # Dropout1d drops whole channels, so the dimensions of the embedding go to axis 1.
        embedded = self.dropout(self.embedding(words).transpose(1, 2)).transpose(1, 2)
        # In a packed sequence the backward direction starts at the last word, not in the padding.
        packed = pack_padded_sequence(
            embedded, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        padding = torch.arange(states.shape[1], device=words.device) >= lengths[:, None]
        highest = states.masked_fill(padding[..., None], float("-inf")).amax(1)
        average = states.sum(1) / lengths[:, None]  # states of padding are zero
        return self.linear(torch.cat([average, highest], 1))  # type: ignore[no-any-return]


class Capsules(nn.Module):
    """A capsule network: embedding, primary capsules, one class capsule for every label.

    The paper (4.5.2) gives 32 types of primary capsules of dimension 8 at stride 1 and class
    capsules of dimension 16. These are the vector capsules of Sabour, Frosst and Hinton (2017), and
    so is the dynamic routing here; the paper cites EM routing, whose capsules are matrices. The
    paper leaves open the following choices, which are ours: primary capsules come from a
    convolution over the embedding's whole width and three words, one window for each word, so a
    comment of 150 words has 4,800; they share the prediction weights of their type; windows centred
    on padding are excluded. There are 255,232 parameters besides those of a learned embedding.

    The logit of a label is ``log(|s|**2)``, where s is its capsule before squashing. This is the
    logit of the squashed capsule's length, ``|s|**2 / (1 + |s|**2)``, as a probability.

    Parameters
    ----------
    vocabulary, vectors, num_labels, dimension
        The parameters of `BiGRU`.
    """

    def __init__(
        self,
        vocabulary: int,
        vectors: NDArray | None = None,
        num_labels: int = 6,
        dimension: int = 300,
    ) -> None:
        super().__init__()
        self.embedding = embedding(vocabulary, dimension, vectors)
        width = self.embedding.embedding_dim
        self.primary = nn.Conv1d(width, TYPES * PRIMARY, 3, padding=1)
        # Small weights, so that sums over thousands of capsules are short in the beginning.
        weights = torch.randn(TYPES, num_labels, PRIMARY, CLASS) * 0.01
        self.predictions = nn.Parameter(weights)

    def forward(self, words: Tensor) -> Tensor:
        """Map [N, length] to logits [N, num_labels]."""
        features = self.primary(self.embedding(words).transpose(1, 2)).transpose(1, 2).float()
        capsules = squash(features.unflatten(-1, (TYPES, PRIMARY)))
        capsules = capsules * (words != PAD)[..., None, None]
        # Sums over thousands of capsules and the logarithm need float32.
        with torch.autocast(words.device.type, enabled=False):
            summed = routed(capsules, self.predictions, ROUTINGS)
        return (summed.square().sum(-1) + 1e-12).log()


def squash(vectors: Tensor) -> Tensor:
    """Scale vectors [..., dimension] of length n to length n**2 / (1 + n**2); zero stays zero.

    Examples
    --------
    >>> squash(torch.tensor([3.0, 4.0]))
    tensor([0.5769, 0.7692])
    """
    square = vectors.square().sum(-1, keepdim=True)
    # The square root has an infinite gradient at zero.
    return vectors * (square + 1e-12).sqrt() / (1 + square)


def routed(capsules: Tensor, weights: Tensor, iterations: int) -> Tensor:
    """Return the class capsules of dynamic routing before squashing.

    Capsule i of type t predicts ``u_i @ weights[t, j]`` for class j. A class capsule is the sum of
    the predictions weighted by a softmax over the classes, whose inputs start at zero and grow by
    the agreement ``prediction . squash(sum)``. Only the last iteration has gradients. Because
    weights are shared, the predictions [N, P, types, classes, CLASS] are never formed: capsules are
    summed first and then multiplied.

    Parameters
    ----------
    capsules : Tensor, [N, P, types, PRIMARY]
        The primary capsules at P positions.
    weights : Tensor, [types, classes, PRIMARY, CLASS]
        The prediction weights.
    iterations : int
        The number of iterations, at least 1.

    Returns
    -------
    Tensor, [N, classes, CLASS]
        The sums.
    """
    n, places, types, _ = capsules.shape
    inputs = capsules.new_zeros(n, places, types, weights.shape[1])
    with torch.no_grad():
        for _ in range(iterations - 1):
            outputs = squash(_sums(capsules, weights, inputs))
            # (u_i @ W) . v is u_i . (W @ v), which needs no predictions either.
            wanted = torch.einsum("tjde,nje->njtd", weights, outputs)
            inputs = inputs + torch.einsum("nptd,njtd->nptj", capsules, wanted)
    return _sums(capsules, weights, inputs)


def _sums(capsules: Tensor, weights: Tensor, inputs: Tensor) -> Tensor:
    pooled = torch.einsum("nptj,nptd->njtd", inputs.softmax(-1), capsules)
    return torch.einsum("njtd,tjde->nje", pooled, weights)


def bigru_small(**options: Any) -> BiGRU:
    """Return a compact `BiGRU` for CPUs: 64 learned dimensions and 32 units in each direction.

    There are 19,590 parameters besides those of the embedding.
    """
    return BiGRU(dimension=64, units=32, **options)


class WordMean(nn.Module):
    """The mean of the words' vectors and a linear layer, for CPUs.

    Padding is excluded; a comment without words has the mean zero. There are 390 parameters besides
    those of a learned embedding of 64 dimensions.

    Parameters
    ----------
    vocabulary, vectors, num_labels, dimension
        The parameters of `BiGRU`; `dimension` is 64 by default.
    """

    def __init__(
        self,
        vocabulary: int,
        vectors: NDArray | None = None,
        num_labels: int = 6,
        dimension: int = 64,
    ) -> None:
        super().__init__()
        self.embedding = embedding(vocabulary, dimension, vectors)
        self.linear = nn.Linear(self.embedding.embedding_dim, num_labels)

    def forward(self, words: Tensor) -> Tensor:
        """Map [N, length] to logits [N, num_labels]."""
        counted = (words != PAD)[..., None]
        total = (self.embedding(words) * counted).sum(1)
        return self.linear(total / counted.sum(1).clamp(min=1))  # type: ignore[no-any-return]
