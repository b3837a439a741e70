"""Transforms of image batches in TensorFlow, eagerly, in a tf.function or in a graph.

A transform is a function ``(inputs, training, seed) -> inputs``. All random numbers are drawn from
`seed`, an integer tensor [2] that is different in every step.
"""

from collections.abc import Callable

from clients.tasks import cifar10
from clients.tensorflow.setup import tf

Transform = Callable[[tf.Tensor, bool, tf.Tensor], tf.Tensor]


def no_transform(inputs: tf.Tensor, training: bool, seed: tf.Tensor) -> tf.Tensor:
    """Return the inputs unchanged."""
    return inputs


def normalise(inputs: tf.Tensor, training: bool, seed: tf.Tensor) -> tf.Tensor:
    """Scale CIFAR-10's uint8 images [N, 32, 32, 3] to zero mean, unit variance per channel."""
    return (tf.cast(inputs, tf.float32) / 255 - cifar10.MEAN) / cifar10.STD


def augment(inputs: tf.Tensor, training: bool, seed: tf.Tensor) -> tf.Tensor:
    """Normalise; in training also crop at random from 4 pixels of padding and flip at random."""
    inputs = normalise(inputs, training, seed)
    if not training:
        return inputs
    seeds = tf.random.split(seed, 2)
    return random_flip(random_crop(inputs, 4, seeds[0]), seeds[1])


def random_crop(images: tf.Tensor, padding: int, seed: tf.Tensor) -> tf.Tensor:
    """Shift every image [N, H, W, C] by its own random offset, filling with zeros."""
    n, (height, width) = tf.shape(images)[0], images.shape[1:3]
    padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    offsets = tf.random.stateless_uniform([2, n, 1], seed, 0, 2 * padding + 1, tf.int32)
    # batch_dims=1 gathers with each image's own indices.
    rows = tf.gather(padded, offsets[0] + tf.range(height), axis=1, batch_dims=1)
    return tf.gather(rows, offsets[1] + tf.range(width), axis=2, batch_dims=1)


def random_flip(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirror every image [N, H, W, C] left to right with probability one half."""
    chances = tf.random.stateless_uniform([tf.shape(images)[0], 1, 1, 1], seed)
    return tf.where(chances < 0.5, images[:, :, ::-1], images)
