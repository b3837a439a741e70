"""Kamp et al.'s divergence, written for the tests."""

import numpy as np


def divergence(models):
    """The mean squared distance of models to their mean, over all their arrays."""
    flat = [np.concatenate([np.ravel(a).astype(float) for a in m.values()]) for m in models]
    mean = np.mean(flat, axis=0)
    return float(np.mean([np.sum((each - mean) ** 2) for each in flat]))
