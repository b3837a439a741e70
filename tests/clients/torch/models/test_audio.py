import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from clients.torch.models.audio import (
    AUDIOSET,
    DEEP,
    SHALLOW,
    SPEECH,
    Attention,
    AttentionHead,
    AverageHead,
    MaxHead,
    MultiAttentionHead,
)
from flwr_colearn import Role
from flwr_colearn.torch import roles as roles_of

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

MODELS = {**SPEECH, **AUDIOSET}
SHAPES = dict.fromkeys(SPEECH, (1, 98, 40)) | dict.fromkeys(AUDIOSET, (240, 64))
LN3 = math.log(3)  # of which the sigmoid is 3/4


def conv(inputs, outputs, height, width, bias=False):
    return inputs * outputs * height * width + (outputs if bias else 0)


def norm(*channels):
    return 2 * sum(channels)


def linear(inputs, outputs):
    return inputs * outputs + outputs


def gru(inputs, hidden):
    """Three gates, each with input and hidden weights and two biases, in two directions."""
    return 2 * 3 * (inputs * hidden + hidden * hidden + 2 * hidden)


BODY = (
    sum(conv(i, o, 3, 3) for i, o in ((1, 32), (32, 64), (64, 128), (128, 128)))
    + norm(32, 64, 128, 128)
    + gru(128, 128)
)


def sizes(classes):
    """Parameters of every model."""
    trad = conv(1, 64, 20, 8, True) + conv(64, 64, 10, 4, True)
    small = conv(1, 16, 5, 5) + conv(16, 32, 3, 3) + conv(32, 64, 3, 3) + conv(64, 64, 3, 3)
    return {
        "cnn-trad-fpool3": trad
        # Without padding 98 x 40 becomes 79 x 33, pooled 79 x 11, and 70 x 8.
        + linear(64 * (98 - 19 - 9) * ((40 - 7) // 3 - 3), 32)
        + linear(32, 128)
        + linear(128, classes),
        "cnn-small": small + norm(16, 32, 64, 64) + linear(64, classes),
        "crnn-average": BODY + linear(256, classes),
        "crnn-max": BODY + linear(256, classes),
        "crnn-attention": BODY + 2 * linear(256, classes),
        "crnn-multi-attention": BODY
        + 2 * linear(128, classes)
        + 2 * linear(256, classes)
        + linear(2 * classes, classes),
    }


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_output_shape(name):
    model = MODELS[name](num_classes=17)
    assert sum(p.numel() for p in model.parameters()) == sizes(17)[name]
    assert model(torch.randn(2, *SHAPES[name])).shape == (2, 17)


def test_the_sizes_that_the_docstrings_give():
    assert [sizes(30)[name] for name in SPEECH] == [1_329_214, 62_606]
    assert [sizes(527)[name] for name in AUDIOSET] == [574_191, 574_191, 709_630, 1_401_581]
    for name, classes in (*zip(SPEECH, [30] * 2, strict=True), ("crnn-max", 527)):
        assert sum(p.numel() for p in MODELS[name]().parameters()) == sizes(classes)[name]


def test_the_published_numbers_of_cnn_trad_fpool3():
    model = SPEECH["cnn-trad-fpool3"](num_classes=4)
    weights = [p.numel() for p in model.parameters() if p.dim() > 1]
    # Sainath & Parada's table: 10.2K, 163.8K, 65.5K (for 32 frames), 4.1K, 0.5K.
    assert [weights[i] for i in (0, 1, 3, 4)] == [10_240, 163_840, 4_096, 512]
    assert 32 * model[:6](torch.zeros(1, 1, 32, 40)).shape[1] == 65_536


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_reached_by_the_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name](num_classes=3)
    outputs = model(torch.randn(4, *SHAPES[name]))
    targets = torch.eye(3)[[0, 1, 2, 0]]
    nn.functional.binary_cross_entropy_with_logits(outputs, targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", AUDIOSET)
def test_arrays_of_a_crnn_have_roles_and_batch_norm_its_statistics(name):
    model = AUDIOSET[name](num_classes=3)
    roles = list(roles_of(model).values())
    assert roles.count(Role.TRAINABLE) == len(list(model.parameters()))
    assert (roles.count(Role.MEAN), roles.count(Role.VARIANCE)) == (4, 4)


def test_a_crnn_has_sixty_frames_of_which_the_last_ones_see_the_first():
    torch.manual_seed(0)
    frames = []
    model = AUDIOSET["crnn-max"](num_classes=3).eval()
    model.head.register_forward_hook(lambda module, inputs, output: frames.append(inputs))
    inputs = torch.randn(2, 240, 64)
    changed = inputs.clone()
    changed[:, :8] += 1
    model(inputs)
    model(changed)
    (shallow, deep), (shallow_changed, deep_changed) = frames
    assert (shallow.shape, deep.shape) == ((2, 60, SHALLOW), (2, 60, DEEP))
    assert torch.equal(shallow[:, -1], shallow_changed[:, -1])
    # The forward direction carries the change on; the backward one begins at the end.
    before, after = (d[:, 5] for d in (deep, deep_changed))
    assert not torch.equal(before[:, :128], after[:, :128])
    assert torch.equal(deep[:, -1, 128:], deep_changed[:, -1, 128:])


def frames(*values, features):
    """One clip whose frames have these first features, the others zero."""
    clip = torch.zeros(1, len(values), features)
    for index, value in enumerate(values):
        clip[0, index, : len(value)] = torch.tensor(value)
    return clip


def set_linear(layer, rows):
    """Let a layer see the first features only, without bias."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[:, : len(rows[0])] = torch.tensor(rows)


def set_attention(attention):
    set_linear(attention.attention, [[1.0, 0.0], [0.0, 1.0]])
    set_linear(attention.classes, [[1.0, 0.0], [-1.0, 0.0]])


CLIP = ((LN3, 0.0), (0.0, 0.0))
# Softmax over classes: (3/4, 1/4) and (1/2, 1/2); over time: (3/5, 2/5) and (1/3, 2/3).
# Sigmoids: (3/4, 1/4) and (1/2, 1/2).
ATTENDED = [3 / 5 * 3 / 4 + 2 / 5 * 1 / 2, 1 / 3 * 1 / 4 + 2 / 3 * 1 / 2]


def logits(*probabilities):
    return [math.log(p / (1 - p)) for p in probabilities]


def test_attention_is_the_weighted_sum_of_sigmoids():
    attention = Attention(2, 2)
    set_attention(attention)
    [found] = attention(frames(*CLIP, features=2)).tolist()
    assert found == pytest.approx(ATTENDED)
    head = AttentionHead(2)
    set_attention(head.deep)
    [found] = head(None, frames(*CLIP, features=DEEP)).tolist()
    assert found == pytest.approx(logits(*ATTENDED), abs=1e-5)


def test_multi_attention_is_a_linear_layer_on_both_depths():
    head = MultiAttentionHead(2)
    set_attention(head.shallow)
    set_attention(head.deep)
    set_linear(head.classes, [[10.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    still = ((0.0, 0.0),)  # of which both probabilities are 1/2
    [found] = head(frames(*CLIP, features=SHALLOW), frames(*still, features=DEEP)).tolist()
    assert found == pytest.approx([10 * ATTENDED[0] + 0.5, 1.5])


@pytest.mark.parametrize(
    ("head", "expected"),
    [(AverageHead, logits(5 / 8, 3 / 8)), (MaxHead, [LN3, 0.0])],
)
def test_average_and_maximum_over_time(head, expected):
    head = head(2)
    set_linear(head.classes, [[1.0, 0.0], [-1.0, 0.0]])
    [found] = head(None, frames(*CLIP, features=DEEP)).tolist()
    assert found == pytest.approx(expected, abs=1e-5)


def test_certain_frames_give_finite_logits():
    head = AverageHead(2)
    set_linear(head.classes, [[1.0], [-1.0]])
    [found] = head(None, frames((1000.0,), features=DEEP)).tolist()
    assert found == pytest.approx([math.log(1e12), -math.log(1e12)], rel=1e-2)


def test_a_class_that_no_frame_attends_to_is_finite():
    attention = Attention(2, 2)
    set_linear(attention.attention, [[0.0, 200.0], [0.0, -200.0]])  # exp(-400) is 0 in float32
    set_linear(attention.classes, [[1.0, 0.0], [1.0, 0.0]])
    found = attention(torch.tensor([[[0.5, 1.0], [0.5, 1.0]]]))
    np.testing.assert_allclose(found.detach(), torch.sigmoid(torch.tensor([[0.5, 0.5]])))


@pytest.mark.parametrize("name", AUDIOSET)
def test_half_precision_rounds_no_probability_to_one(name):
    torch.manual_seed(0)
    model = AUDIOSET[name](num_classes=3).eval()
    inputs = torch.randn(2, 240, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = copy.deepcopy(model)(inputs).float()
    np.testing.assert_allclose(half, model(inputs).detach(), atol=0.03)
