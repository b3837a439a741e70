"""The import of tf-slim 1.1 with current TensorFlow: ``from clients.slim.compat import slim``."""

import sys
import warnings
from importlib import import_module

from clients.tensorflow.setup import tf

# tf-slim imports tf_keras.legacy_tf_layers through TensorFlow; tf-keras has it at another path.
for _name in ("", ".base", ".convolutional", ".core", ".normalization", ".pooling"):
    sys.modules.setdefault(
        f"tf_keras.legacy_tf_layers{_name}", import_module(f"tf_keras.src.legacy_tf_layers{_name}")
    )

# It also uses two classes from a module in which current TensorFlow does not have them.
_ops = import_module("tensorflow.python.framework.ops")
for _class in (tf.Tensor, tf.IndexedSlices):
    if not hasattr(_ops, _class.__name__):
        setattr(_ops, _class.__name__, _class)

# The warning concerns tf-slim's own code, not the user's, and would appear for every layer.
warnings.filterwarnings("ignore", message=r"`(layer|tf\.layers)\.\w+` is deprecated")

slim = import_module("tf_slim")
nets = import_module("tf_slim.nets")

__all__ = ["nets", "slim", "tf"]
