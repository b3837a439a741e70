"""Keras networks: those of `clients.torch.models.small`, layer by layer, and Keras's own."""

from collections.abc import Callable

from clients.tensorflow.setup import keras

layers = keras.layers

# PyTorch's defaults. With Keras's momentum of 0.99 the moving statistics would follow too slowly in
# rounds of few steps.
_NORM = {"momentum": 0.9, "epsilon": 1e-5}


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


def vgg19(num_classes: int = 10) -> keras.Model:
    """Return Keras's VGG-19 for 32x32 images: its convolutions and one dense layer.

    It has 20,029,514 parameters for 10 classes. The PyTorch model of this name has 20,040,522; the
    other 11,008 are in batch norm, which Keras's VGG-19 does not have. Kernels are initialised as
    in He et al. (2015): with Keras's default (Glorot), outputs are of size 0.0004 and SGD at the
    paper's learning rate makes no progress.
    """

    def adapted(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if isinstance(layer, layers.Conv2D):
            config["kernel_initializer"] = "he_normal"
        return type(layer).from_config(config)

    return _classifier(keras.applications.VGG19, num_classes, adapted)


def resnet152(num_classes: int = 10) -> keras.Model:
    """Return Keras's ResNet-152 for 32x32 images (58,164,298 parameters for 10 classes).

    The PyTorch model of this name has the same number: the 75,712 biases of Keras's convolutions,
    which batch norm cancels, are left out. As in PyTorch, the first convolution has stride 1 and
    no pooling follows. The other strides are in a block's first convolution, as in He et al.
    (2016); in torchvision they are in the second.
    """

    def adapted(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if layer.name in ("pool1_pad", "pool1_pool"):
            return layers.Identity()
        if layer.name == "conv1_conv":
            config["strides"] = 1
        if isinstance(layer, layers.Conv2D):
            config.update(use_bias=False, kernel_initializer="he_normal")
        if isinstance(layer, layers.BatchNormalization):
            config.update(_NORM)
        return type(layer).from_config(config)

    return _classifier(keras.applications.ResNet152, num_classes, adapted)


def _classifier(
    build: Callable[..., keras.Model],
    num_classes: int,
    adapted: Callable[[keras.layers.Layer], keras.layers.Layer],
) -> keras.Model:
    """Return an application for 32x32 images with adapted layers and one dense layer on top."""
    # clone_model builds every layer again from what `adapted` returns, with new weights.
    features = build(weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg")
    features = keras.models.clone_model(features, clone_function=adapted)
    return keras.Model(features.input, layers.Dense(num_classes)(features.output))


def _basic_block(inputs: keras.KerasTensor, channels: int, stride: int) -> keras.KerasTensor:
    outputs = layers.ReLU()(_norm()(_convolution(channels, 3, stride)(inputs)))
    outputs = _norm()(_convolution(channels)(outputs))
    if stride > 1:
        inputs = _norm()(_convolution(channels, 1, stride)(inputs))
    return layers.ReLU()(layers.Add()([outputs, inputs]))


def _convolution(channels: int, size: int = 3, stride: int = 1) -> keras.layers.Layer:
    return layers.Conv2D(
        channels,
        size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )


def _norm() -> keras.layers.Layer:
    return layers.BatchNormalization(**_NORM)
