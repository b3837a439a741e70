"""The import of TensorFlow and Keras with the settings that participants need.

Participants import both from this module, never directly.
"""

import os
from contextlib import suppress

# Both are read at import, so they are set before it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only: no information, no warnings
os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # takes precedence over ~/.keras/keras.json

import keras
import tensorflow as tf
from tensorflow.python.eager import context

from flwr_colearn import ColearnError

__all__ = ["check_device", "forget_kernels", "grow_memory", "keras", "tf"]


def grow_memory() -> None:
    """Make TensorFlow allocate a GPU's memory as needed, since participants may share a GPU.

    By default the first process allocates nearly all of it.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        with suppress(RuntimeError):  # raised if the program has used the GPU before
            tf.config.experimental.set_memory_growth(gpu, True)


def forget_kernels() -> None:
    """Drop TensorFlow's cache of the kernels of operations, which are made again when needed.

    Every variable of a model has kernels of its own, which the cache would hold for ever, some
    0.3 MiB for a small model. ``keras.utils.clear_session`` does the same, but also forgets the
    names of layers, which other models of the process may be using.
    """
    context.context().clear_kernel_cache()


def check_device(device: str) -> str:
    """Return a device's full name, ``CPU:0`` for "cpu".

    Raises
    ------
    ColearnError
        If there is no such device. TensorFlow itself would train on another one without a warning.
    """
    present = [each.name.removeprefix("/device:") for each in tf.config.list_logical_devices()]
    name = device.lstrip("/").upper()
    name = name if ":" in name else f"{name}:0"
    if name not in present:
        raise ColearnError(f"device: expected one of {', '.join(present)}, found {device!r}")
    return name


grow_memory()
