"""Linear probes: how much of an answer can be read off activations by a linear map.

Shape legend: n training rows, t test rows, d width, c classes, q penalties.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PENALTIES = tuple(10.0**i for i in range(-4, 3))
"""λ over the mean squared singular value of the standardised training rows."""


class Probe:
    """Ridge regression onto classes (one column each, 1 for the own class), of which the largest is the prediction.

    Columns are standardised; the penalty is the one with the most right leave-one-out predictions on the training
    rows, in closed form: row i left out, its prediction is `(ŷ_i − h_ii y_i) / (1 − h_ii)`, h the hat matrix.
    """

    def __init__(self, x: np.ndarray, n_classes: int) -> None:
        """Factorise the training rows `[n, d]` once for all labels that are fitted to them."""
        self._mean, spread = x.mean(0), x.std(0)
        self._scale = np.where(spread > 1e-12 * np.abs(x).max(initial=1e-300), spread, np.inf)
        self._u, self._s, self._vt = np.linalg.svd((x - self._mean) / self._scale, full_matrices=False)
        self._n_classes = n_classes

    def predict(self, labels: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Classes `[t]` of rows `[t, d]`, fitted to the training rows with `labels` `[n]`, 0 … c − 1."""
        target = np.eye(self._n_classes)[labels]
        centre = target.mean(0)
        projected = self._u.T @ (target - centre)
        shrink = self._shrink(self._best(labels, target, centre, projected))
        inverse = np.divide(shrink, self._s, out=np.zeros_like(shrink), where=self._s > 0)
        weights = self._vt.T @ (inverse[:, None] * projected)
        scores: np.ndarray = (x - self._mean) / self._scale @ weights + centre
        return scores.argmax(1)

    def _best(self, labels: np.ndarray, target: np.ndarray, centre: np.ndarray, projected: np.ndarray) -> float:
        right = [
            (self.left_out(penalty, target, centre, projected).argmax(1) == labels).mean() for penalty in PENALTIES
        ]
        return PENALTIES[len(right) - 1 - int(np.argmax(right[::-1]))]  # of equals the strongest

    def left_out(self, penalty: float, target: np.ndarray, centre: np.ndarray, projected: np.ndarray) -> np.ndarray:
        """Scores `[n, c]` of every training row from all others; a row that alone decides its own score gets zeros."""
        shrink = self._shrink(penalty)
        fitted = centre + self._u @ (shrink[:, None] * projected)
        own = 1 / len(target) + np.square(self._u) @ shrink
        rest = (1 - own)[:, None]
        return np.divide(fitted - own[:, None] * target, rest, out=np.zeros_like(fitted), where=rest > 1e-9)

    def _shrink(self, penalty: float) -> np.ndarray:
        squares = np.square(self._s)
        return squares / (squares + penalty * squares.mean()) if squares.any() else squares


def shuffled_within(labels: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`labels` `[n]` exchanged at random between rows of the same group `[n]`."""
    found = labels.copy()
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        found[rows] = labels[rng.permutation(rows)]
    return found


def encode(labels: Sequence[int] | np.ndarray, known: np.ndarray) -> np.ndarray:
    """Places of `labels` in the ascending `known`; −1 for others."""
    values = np.asarray(labels)
    place = np.searchsorted(known, values).clip(max=len(known) - 1)
    return np.where(known[place] == values, place, -1)
