"""TF-slim networks for the tasks, as functions ``(inputs, is_training) -> logits``."""

from typing import Any

from clients.slim.compat import nets, slim, tf


def small_cnn(inputs: tf.Tensor, is_training: bool) -> tf.Tensor:
    """Build a CNN of two convolutions with batch norm and one linear layer (9,978 parameters)."""
    with _convolutions(is_training):
        net = slim.conv2d(inputs, 16, 3)
        net = slim.conv2d(net, 32, 3)
        net = slim.flatten(slim.max_pool2d(net, 2))
        return slim.fully_connected(net, 10, activation_fn=None, scope="logits")


def resnet8(inputs: tf.Tensor, is_training: bool) -> tf.Tensor:
    """Build a compact residual CNN for CPUs: three basic blocks of 16, 32 and 64 channels."""
    with _convolutions(is_training):
        net = slim.conv2d(inputs, 16, 3)
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            with tf.compat.v1.variable_scope(f"block_{channels}"):
                residual = slim.conv2d(net, channels, 3, stride=stride)
                residual = slim.conv2d(residual, channels, 3, activation_fn=None)
                if stride > 1:
                    net = slim.conv2d(net, channels, 1, stride=stride, activation_fn=None)
                net = tf.nn.relu(net + residual)
        return slim.fully_connected(tf.reduce_mean(net, [1, 2]), 10, None, scope="logits")


def vgg_19(inputs: tf.Tensor, is_training: bool) -> tf.Tensor:
    """Build ``tf_slim.nets``'s VGG-19 for ten classes, on images scaled up to its 224x224."""
    # No weight decay by the network: the trainer applies that of the settings to all its variables.
    with slim.arg_scope(nets.vgg.vgg_arg_scope(weight_decay=0.0)):
        logits, _ = nets.vgg.vgg_19(tf.image.resize(inputs, [224, 224]), 10, is_training)
    return logits


def resnet_152(inputs: tf.Tensor, is_training: bool) -> tf.Tensor:
    """Build ``tf_slim.nets``'s ResNet-152 for ten classes."""
    with slim.arg_scope(nets.resnet_v1.resnet_arg_scope(weight_decay=0.0)):
        logits, _ = nets.resnet_v1.resnet_v1_152(inputs, 10, is_training=is_training)
    return tf.squeeze(logits, [1, 2])


def _convolutions(is_training: bool) -> Any:
    """Return an arg_scope of convolutions with batch norm."""
    # PyTorch's defaults. With slim's decay of 0.999 the moving statistics would follow too slowly
    # in rounds of few steps.
    norm = {"is_training": is_training, "decay": 0.9, "epsilon": 1e-5, "scale": True}
    return slim.arg_scope([slim.conv2d], normalizer_fn=slim.batch_norm, normalizer_params=norm)
