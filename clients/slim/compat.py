"""tf-slim 1.1 with today's TensorFlow: ``from clients.slim.compat import slim``."""

import sys
import warnings
from importlib import import_module

from clients.tensorflow.setup import tf

# tf-slim, through TensorFlow, looks for tf_keras.legacy_tf_layers, which tf-keras has elsewhere.
for _name in ("", ".base", ".convolutional", ".core", ".normalization", ".pooling"):
    sys.modules.setdefault(
        f"tf_keras.legacy_tf_layers{_name}", import_module(f"tf_keras.src.legacy_tf_layers{_name}")
    )

# It also looks for two classes where TensorFlow kept them in its day.
_ops = import_module("tensorflow.python.framework.ops")
for _class in (tf.Tensor, tf.IndexedSlices):
    if not hasattr(_ops, _class.__name__):
        setattr(_ops, _class.__name__, _class)

# The business of tf-slim itself, and said for every layer.
warnings.filterwarnings("ignore", message=r"`(layer|tf\.layers)\.\w+` is deprecated")

slim = import_module("tf_slim")
nets = import_module("tf_slim.nets")

__all__ = ["nets", "slim", "tf"]
