"""Dynamic averaging (Kamp et al., 2018) in plain numpy, for comparison: it shares no code with the
product.

Only the order in which further learners are asked is a free choice of the coordinator. It is an
argument, so that a run of the product can be replayed with the choices that it made.
"""

import numpy as np


class Protocol:
    """m learners, the reference r and the number of violations v, from one common model.

    Attributes
    ----------
    f : array, [m, n]
        The models.
    r : array, [n]
        The reference.
    v : int
        Violations since the last synchronisation of all learners.
    n : array, [m]
        Examples of every learner since then, the weights of the means.
    """

    def __init__(self, m, common, delta):
        self.f = np.array([common] * m, float)
        self.r = np.array(common, float)
        self.v, self.n, self.delta = 0, np.zeros(m), delta

    def outside(self, model):
        return ((model - self.r) ** 2).sum() > self.delta(self.r)

    def mean(self, members):
        members = sorted(members)
        share = self.n[members] / self.n[members].sum()
        return share @ self.f[members]

    def learn(self, models, examples):
        self.f, self.n = np.array(models, float), self.n + examples

    def synchronise(self, draw):
        """Play one opportunity; return the violators, and the set B that got a mean.

        `draw(size)` returns so many learners that are not yet in B.
        """
        everybody = set(range(len(self.f)))
        violators = {i for i in everybody if self.outside(self.f[i])}
        if not violators:
            return violators, set()
        members = set(violators)
        self.v += len(violators)
        if self.v >= len(everybody):
            left = everybody - members
            if left:
                assert draw(len(left)) == left
            members = everybody
        size = 1
        while members != everybody and self.outside(self.mean(members)):
            size = min(size, len(everybody - members))
            more = draw(size)
            assert len(more) == size
            assert not more & members
            members |= more
            size *= 2
        new = self.mean(members)
        self.f[sorted(members)] = new
        if members == everybody:
            self.r, self.v, self.n = new, 0, np.zeros(len(everybody))
        return violators, members
