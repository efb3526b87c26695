from __future__ import annotations

import numpy as np
import pytest

from hagd.validation.probe import PENALTIES, Probe, encode, shuffled_within


def rows(n: int, d: int, classes: int, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return np.random.default_rng(9).normal(size=(classes, d))[labels] + noise * rng.normal(size=(n, d)), labels


def solved(x: np.ndarray, labels: np.ndarray, classes: int, penalty: float, at: np.ndarray) -> np.ndarray:
    """Ridge scores at rows `at` from the normal equations; `x` and `at` standardised already."""
    target = np.eye(classes)[labels]
    mean, centre = x.mean(0), target.mean(0)
    gram = (x - mean).T @ (x - mean) + penalty * np.eye(x.shape[1])
    return (at - mean) @ np.linalg.solve(gram, (x - mean).T @ (target - centre)) + centre


def standard(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    return (x - like.mean(0)) / like.std(0)


def test_left_out_rows_are_predicted_from_all_others() -> None:
    x, labels = rows(14, 5, 3)
    probe, target = Probe(x, 3), np.eye(3)[labels]
    z = standard(x, x)
    unit = np.square(np.linalg.svd(z, compute_uv=False)).mean()
    centre = target.mean(0)
    for penalty in PENALTIES:
        found = probe.left_out(penalty, target, centre, probe._u.T @ (target - centre))
        by_hand = []
        for i in range(14):
            rest = np.arange(14) != i
            by_hand.append(solved(z[rest], labels[rest], 3, penalty * unit, z[i]))
        assert np.allclose(found, by_hand, atol=1e-8), penalty


def test_predictions_are_those_of_the_best_penalty() -> None:
    (x, labels), (at, _) = rows(40, 6, 4, noise=2.0), rows(30, 6, 4, seed=1, noise=2.0)
    z = standard(x, x)
    unit = np.square(np.linalg.svd(z, compute_uv=False)).mean()
    right = []
    for penalty in PENALTIES:
        guesses = [
            solved(np.delete(z, i, 0), np.delete(labels, i), 4, penalty * unit, z[i]).argmax() for i in range(40)
        ]
        right.append(np.mean(guesses == labels))
    best = max((value, penalty) for value, penalty in zip(right, PENALTIES, strict=True))[1]
    wanted = solved(z, labels, 4, best * unit, standard(at, x)).argmax(1)
    assert np.array_equal(Probe(x, 4).predict(labels, at), wanted)


@pytest.mark.parametrize("d", [3, 80])
def test_separate_classes_are_told_apart_and_shuffled_ones_are_not(d: int) -> None:
    (x, labels), (at, wanted) = rows(60, d, 3, noise=0.05), rows(200, d, 3, seed=1, noise=0.05)
    assert (Probe(x, 3).predict(labels, at) == wanted).all()
    shuffled = shuffled_within(labels, np.zeros(60), np.random.default_rng(0))
    assert (Probe(x, 3).predict(shuffled, at) == wanted).mean() < 0.7


def test_nothing_to_read_gives_the_most_frequent_class() -> None:
    labels = np.array([0, 1, 1, 2])
    assert (Probe(np.ones((4, 3)), 3).predict(labels, np.ones((5, 3))) == 1).all()


def test_labels_are_exchanged_within_groups() -> None:
    labels, groups = np.arange(20), np.repeat([0, 1], 10)
    found = shuffled_within(labels, groups, np.random.default_rng(0))
    assert set(found[:10]) == set(range(10)) and set(found[10:]) == set(range(10, 20))
    assert not np.array_equal(found, labels) and np.array_equal(labels, np.arange(20))


def test_unknown_labels_have_no_class() -> None:
    assert encode(np.array([7, 3, 9, 1, 5]), np.array([3, 7])).tolist() == [1, 0, -1, -1, -1]
