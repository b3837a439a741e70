"""PyTorch networks on log-mel spectrograms: Speech Commands' words and AudioSet's tags."""

from functools import partial

import torch
from torch import Tensor, nn


def cnn_trad_fpool3(num_classes: int = 30) -> nn.Module:
    """Return `cnn-trad-fpool3` (Sainath & Parada, 2015) for [N, 1, 98, 40].

    Convolutions of 64 channels, 20x8 and, after pooling by 3 in frequency, 10x4 (time x frequency,
    without padding), a linear layer of 32, a dense one of 128, and the classes. 1,329,214
    parameters with 30 classes: most in the linear layer, since our clips are three times as long
    as the paper's 32 frames.
    """
    return nn.Sequential(
        nn.Conv2d(1, 64, (20, 8)),
        nn.ReLU(),
        nn.MaxPool2d((1, 3)),
        nn.Conv2d(64, 64, (10, 4)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 70 * 8, 32),
        nn.Linear(32, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def cnn_small(num_classes: int = 30) -> nn.Module:
    """Return four strided convolutions with batch norm and one linear layer, for CPUs.

    For [N, 1, 98, 40]; 62,606 parameters with 30 classes.
    """

    def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 5),
        *block(16, 32, 3),
        *block(32, 64, 3),
        *block(64, 64, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


class Crnn(nn.Module):
    """Convolutions, a bidirectional GRU of 128 a direction, and a head that joins the frames.

    Four blocks of 3x3 convolution, batch norm, ReLU and max pooling take [N, 240, 64] (frames x mel
    bins) to 60 frames of 128 features: time is halved twice, frequency pooled to 1.

    Parameters
    ----------
    head : nn.Module
        ``(shallow, deep) -> logits [N, classes]`` of the frames before the GRU [N, 60, 128] and
        after it [N, 60, 256].
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_block(1, 32, (2, 4)),
            *_block(32, 64, (2, 4)),
            *_block(64, 128, (1, 2)),
            *_block(128, 128, (1, 2)),
        )
        self.gru = nn.GRU(SHALLOW, DEEP // 2, batch_first=True, bidirectional=True)
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, 240, 64] to logits [N, classes]."""
        shallow = self.convolutions(inputs[:, None]).squeeze(-1).transpose(1, 2)
        deep, _ = self.gru(shallow)
        return self.head(shallow, deep)  # type: ignore[no-any-return]


SHALLOW, DEEP = 128, 256
"""Features of a frame before and after the GRU."""

EPSILON = 1e-12
"""Probabilities are kept so far from 0 and 1, that their logits are finite."""


def _block(inputs: int, outputs: int, pool: tuple[int, int]) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(pool)]


class AverageHead(nn.Module):
    """The mean over time of every frame's sigmoid, as a logit."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(DEEP, num_classes)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        # float(): under autocast half precision would round probabilities near 0 and 1.
        return to_logits(torch.sigmoid(self.classes(deep).float()).mean(1))


class MaxHead(nn.Module):
    """The maximum over time of every frame's logit, whose sigmoid is that of their sigmoids."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(DEEP, num_classes)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        return self.classes(deep).amax(1)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Probabilities of a clip: its frames' sigmoids, weighted by attention (Kong et al., 2018).

    Attention is a softmax over the classes of every frame, normalised over time.

    Parameters
    ----------
    features, num_classes : int
        Of a frame, and to tell apart.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.attention = nn.Linear(features, num_classes)
        self.classes = nn.Linear(features, num_classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Map [N, time, features] to probabilities [N, classes], float32."""
        # In logarithms, in which a class that no frame attends to is no 0 / 0.
        weights = torch.log_softmax(self.attention(frames).float(), -1).softmax(1)
        return (weights * torch.sigmoid(self.classes(frames).float())).sum(1)


class AttentionHead(nn.Module):
    """Attention over the GRU's frames, as logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.deep = Attention(DEEP, num_classes)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        return to_logits(self.deep(deep))


class MultiAttentionHead(nn.Module):
    """Attention before and after the GRU, concatenated, and a linear layer (Yu et al., 2018)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.shallow = Attention(SHALLOW, num_classes)
        self.deep = Attention(DEEP, num_classes)
        self.classes = nn.Linear(2 * num_classes, num_classes)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        both = torch.cat([self.shallow(shallow), self.deep(deep)], 1)
        return self.classes(both)  # type: ignore[no-any-return]


def to_logits(probabilities: Tensor) -> Tensor:
    """Return the logits of probabilities, which are first kept `EPSILON` away from 0 and 1."""
    # float64: float32 has no number between 1 - 6e-8 and 1.
    return torch.logit(probabilities.double().clamp(EPSILON, 1 - EPSILON)).float()


def crnn(head: type[nn.Module], num_classes: int = 527) -> nn.Module:
    """Return a CRNN with a head.

    Parameters with 527 classes: 574,191 with `AverageHead` and `MaxHead`, 709,630 with
    `AttentionHead`, 1,401,581 with `MultiAttentionHead`.
    """
    return Crnn(head(num_classes))


SPEECH = {"cnn-trad-fpool3": cnn_trad_fpool3, "cnn-small": cnn_small}
"""Models for task "speech" by name."""

AUDIOSET = {
    "crnn-average": partial(crnn, AverageHead),
    "crnn-max": partial(crnn, MaxHead),
    "crnn-attention": partial(crnn, AttentionHead),
    "crnn-multi-attention": partial(crnn, MultiAttentionHead),
}
"""Models for task "audioset" by name."""
