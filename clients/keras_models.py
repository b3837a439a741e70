"""Keras networks for the tasks: those of `clients.models`, layer by layer."""

from clients.tf_setup import keras

layers = keras.layers


def small_cnn() -> keras.Model:
    """Return a CNN of two convolutions with batch norm and one linear layer (9,978 parameters)."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            _norm(),
            layers.ReLU(),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            _norm(),
            layers.ReLU(),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def resnet8(num_classes: int = 10) -> keras.Model:
    """Return a compact residual CNN for CPUs: three basic blocks of 16, 32 and 64 channels."""
    inputs = keras.Input((32, 32, 3))
    outputs = layers.ReLU()(_norm()(_convolution(16)(inputs)))
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        outputs = _basic_block(outputs, channels, stride)
    outputs = layers.GlobalAveragePooling2D()(outputs)
    return keras.Model(inputs, layers.Dense(num_classes)(outputs))


def densenet40(num_classes: int = 10, growth: int = 12) -> keras.Model:
    """Return DenseNet-40 (k=12) without bottleneck and compression (Huang et al., 2017)."""
    inputs = keras.Input((32, 32, 3))
    outputs = _convolution(16)(inputs)
    for block in range(3):
        for _ in range(12):
            new = _convolution(growth)(layers.ReLU()(_norm()(outputs)))
            outputs = layers.Concatenate()([outputs, new])
        outputs = layers.ReLU()(_norm()(outputs))
        if block < 2:
            outputs = layers.AveragePooling2D(2)(_convolution(outputs.shape[-1], 1)(outputs))
    outputs = layers.GlobalAveragePooling2D()(outputs)
    return keras.Model(inputs, layers.Dense(num_classes)(outputs))


def _basic_block(inputs: keras.KerasTensor, channels: int, stride: int) -> keras.KerasTensor:
    outputs = layers.ReLU()(_norm()(_convolution(channels, 3, stride)(inputs)))
    outputs = _norm()(_convolution(channels)(outputs))
    if stride > 1:
        inputs = _norm()(_convolution(channels, 1, stride)(inputs))
    return layers.ReLU()(layers.Add()([outputs, inputs]))


def _convolution(channels: int, size: int = 3, stride: int = 1) -> layers.Layer:
    return layers.Conv2D(
        channels,
        size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )


def _norm() -> layers.Layer:
    # PyTorch's defaults. Keras's momentum of 0.99 would be too slow for rounds of few steps.
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
