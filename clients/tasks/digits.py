"""The default task: scikit-learn's 1,797 handwritten digits of 8x8 grey pixels."""

from functools import cache

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from clients.data import Examples, Task

TEST_EXAMPLES = 500


@cache
def load() -> Task:
    """Return 1,297 training and 500 test images [8, 8, 1] in [0, 1], float32, in a fixed split."""
    images, labels = load_digits(return_X_y=True)
    # Pixels are whole numbers from 0 to 16.
    inputs = (images / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        inputs, labels.astype(np.int64), test_size=TEST_EXAMPLES, stratify=labels, random_state=0
    )
    return Task(Examples(train_x, train_y), Examples(test_x, test_y))
