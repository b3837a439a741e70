"""Reference participants: they follow a LocalPlan on each site's own data.

PyTorch, Keras and TF-slim models take part alike; see `clients.trainer.Trainer`.
"""

import sys

# Flower's simulation imports TensorFlow wherever it is installed, and PyTorch imports Triton. Each
# brings its own LLVM, and Triton after TensorFlow ends the process: there Triton counts as absent.
# Only torch.compile on a GPU would use it.
if "tensorflow" in sys.modules:
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]  # what an absent module is
