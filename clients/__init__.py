"""Reference participants, which follow a LocalPlan on each site's own data.

Every framework (PyTorch, Keras, TF-slim) implements `clients.trainer.Trainer`.
"""

import sys

# Flower's simulation imports TensorFlow wherever it is installed, and PyTorch imports Triton. Each
# brings its own LLVM, and importing Triton after TensorFlow ends the process. A None entry in
# sys.modules makes `import triton` fail as if Triton were absent, which PyTorch supports: only
# torch.compile on a GPU would use it.
if "tensorflow" in sys.modules:
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]  # the entry of no module
