"""PyTorch networks on log-mel spectrograms, for Speech Commands and AudioSet."""

from functools import partial

import torch
from torch import Tensor, nn


def cnn_trad_fpool3(num_classes: int = 30) -> nn.Module:
    """Return `cnn-trad-fpool3` (Sainath & Parada, 2015) for [N, 1, 98, 40].

    The network has two convolutions of 64 channels, 20x8 and, after pooling by 3 in frequency, 10x4
    (time x frequency, without padding), a linear layer of 32, a dense one of 128, and the classes.
    It has 1,329,214 parameters with 30 classes, most of them in the linear layer, since our clips
    are three times as long as the 32 frames of Sainath & Parada.
    """
    return nn.Sequential(
        nn.Conv2d(1, 64, (20, 8)),
        nn.ReLU(),
        nn.MaxPool2d((1, 3)),
        nn.Conv2d(64, 64, (10, 4)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 70 * 8, 32),  # no activation: the low-rank linear layer
        nn.Linear(32, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def cnn_small(num_classes: int = 30) -> nn.Module:
    """Return four strided convolutions with batch norm and one linear layer, for CPUs.

    The inputs are [N, 1, 98, 40]; there are 62,606 parameters with 30 classes.
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
    """Convolutions, a bidirectional GRU of 128 a direction, and a head that pools over the frames.

    Four blocks of 3x3 convolution, batch norm, ReLU and max pooling map [N, 240, 64] (frames x mel
    bins) to 60 frames of 128 features: time is halved twice, frequency pooled to 1.

    Parameters
    ----------
    head : nn.Module
        The module ``(shallow, deep) -> logits [N, classes]``; its inputs are the frames before the
        GRU [N, 60, 128] and after it [N, 60, 256].
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
"""The number of features of a frame before and after the GRU."""

EPSILON = 1e-12
"""The least distance of probabilities from 0 and 1, so that their logits are finite."""


def _block(inputs: int, outputs: int, pool: tuple[int, int]) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(pool)]


class AverageHead(nn.Module):
    """The head whose probability is the mean over time of every frame's sigmoid."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(DEEP, num_classes)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        # float(): half precision, under autocast, would round probabilities near 0 and 1.
        return to_logits(torch.sigmoid(self.classes(deep).float()).mean(1))


class MaxHead(nn.Module):
    """The head whose logit is the maximum over time of every frame's logit.

    Its sigmoid is the maximum of the frames' sigmoids, since the sigmoid is monotonic.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(DEEP, num_classes)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        return self.classes(deep).amax(1)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """The probabilities of a clip: its frames' sigmoids weighted by attention (Kong et al., 2018).

    Attention is a softmax over the classes of every frame, normalised over time.

    Parameters
    ----------
    features, num_classes : int
        The number of features of a frame, and of classes.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.attention = nn.Linear(features, num_classes)
        self.classes = nn.Linear(features, num_classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Map [N, time, features] to probabilities [N, classes], float32."""
        # Normalised by a softmax of logarithms: dividing by the sum over time would be 0 / 0 for a
        # class whose attention underflows in every frame.
        weights = torch.log_softmax(self.attention(frames).float(), -1).softmax(1)
        return (weights * torch.sigmoid(self.classes(frames).float())).sum(1)


class AttentionHead(nn.Module):
    """The head with attention over the GRU's frames."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.deep = Attention(DEEP, num_classes)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        return to_logits(self.deep(deep))


class MultiAttentionHead(nn.Module):
    """The head with attention before and after the GRU, and a linear layer (Yu et al., 2018)."""

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
    """Return the logits of probabilities, which are first clipped `EPSILON` away from 0 and 1."""
    # float64: float32 has no number between 1 - 6e-8 and 1.
    return torch.logit(probabilities.double().clamp(EPSILON, 1 - EPSILON)).float()


def crnn(head: type[nn.Module], num_classes: int = 527) -> nn.Module:
    """Return a CRNN with a head.

    The parameters with 527 classes are 574,191 with `AverageHead` and `MaxHead`, 709,630 with
    `AttentionHead`, and 1,401,581 with `MultiAttentionHead`.
    """
    return Crnn(head(num_classes))


SPEECH = {"cnn-trad-fpool3": cnn_trad_fpool3, "cnn-small": cnn_small}
"""The models of task "speech" by name."""

AUDIOSET = {
    "crnn-average": partial(crnn, AverageHead),
    "crnn-max": partial(crnn, MaxHead),
    "crnn-attention": partial(crnn, AttentionHead),
    "crnn-multi-attention": partial(crnn, MultiAttentionHead),
}
"""The models of task "audioset" by name."""
