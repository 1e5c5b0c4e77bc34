"""Standard errors against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flash_moe.evaluation import Estimate
from flash_moe.evaluation.estimates import clustered_mean, exponential, proportion


def sample(rng: np.random.Generator, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Values that depend on each other within clusters of 5 to 60."""
    sizes = rng.integers(5, 61, clusters)
    names = np.repeat(np.arange(clusters), sizes)
    return 2 + np.repeat(rng.standard_normal(clusters), sizes) + rng.standard_normal(len(names)), names


def bootstrap(values: np.ndarray, clusters: np.ndarray, rounds: int) -> np.ndarray:
    """Means of samples made by drawing whole clusters with replacement."""
    rng = np.random.default_rng(1)
    count = clusters.max() + 1
    sums, sizes = np.bincount(clusters, values), np.bincount(clusters)
    drawn = rng.integers(0, count, (rounds, count))
    return sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)


def test_clustered_mean_against_a_bootstrap() -> None:
    values, clusters = sample(np.random.default_rng(0), 120)
    found = clustered_mean(values, clusters)
    means = bootstrap(values, clusters, 20_000)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(means.std(), rel=0.03)
    assert found.standard_error > 3 * values.std() / math.sqrt(len(values)), "clusters would not matter here"
    growth = exponential(found)
    assert growth.value == pytest.approx(math.exp(values.mean()))
    assert growth.standard_error == pytest.approx(np.exp(means).std(), rel=0.05)


def test_clustered_mean_against_new_samples() -> None:
    rng = np.random.default_rng(2)
    found = [clustered_mean(*sample(rng, 60)) for _ in range(1500)]
    spread = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.standard_error for estimate in found]) == pytest.approx(spread, rel=0.06)


def test_clusters_of_one_are_independent_values() -> None:
    values = np.random.default_rng(3).standard_normal(50)
    found = clustered_mean(values, np.arange(50))
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_names_and_order_of_clusters_do_not_matter() -> None:
    values, clusters = sample(np.random.default_rng(4), 20)
    order = np.random.default_rng(5).permutation(len(values))
    found, other = clustered_mean(values, clusters), clustered_mean(values[order], 7 * clusters[order] + 3)
    assert other.value == pytest.approx(found.value)
    assert other.standard_error == pytest.approx(found.standard_error)


def test_one_cluster_says_nothing_about_its_error() -> None:
    found = clustered_mean(np.array([True, False]), np.array([4, 4]))
    assert found == Estimate(0.5, None) == Estimate(0.5, exponential(found).standard_error)


def test_proportion() -> None:
    found = proportion(30, 120)
    draws = np.random.default_rng(6).binomial(120, 0.25, 100_000) / 120
    assert found.value == 0.25
    assert found.standard_error == pytest.approx(draws.std(), rel=0.01)
    assert proportion(5, 5) == Estimate(1, 0)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(5.91234, 0.0312), "5.912 ± 0.031"),
        (Estimate(0.00812345, 0.000213), "0.00812 ± 0.00021"),
        (Estimate(123456.7, 4321.0), "123457 ± 4321"),
        (Estimate(2.5, 1.04), "2.5 ± 1.0"),
        (Estimate(1.0, 0.0), "1 ± 0"),
        (Estimate(248319.99999, 4.6e-10), "2.4832e+05 ± 5e-10"),
        (Estimate(3.21e-14, 2.2e-15), "3.21e-14 ± 2e-15"),
        (Estimate(0.0, 0.0), "0 ± 0"),
        (Estimate(1.23456789, None), "1.2346"),
    ],
)
def test_estimates_for_people(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text
