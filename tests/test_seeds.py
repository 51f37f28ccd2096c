"""Each sample's own random numbers: SplitMix64, against its definition in plain integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.rollouts.seeds import sample_seed, uniforms

MASK = 2**64 - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published: a counter stepped by the golden gamma, and two rounds of xor, shift, multiply."""
    outputs, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_the_reference_gives_the_published_numbers() -> None:
    # The first outputs for the seed 1234567, as listed at rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(seeds=st.lists(st.integers(0, MASK), min_size=1, max_size=4), count=st.integers(1, 20))
def test_uniforms_are_the_top_53_bits_of_each_seeds_stream(seeds: list[int], count: int) -> None:
    drawn = uniforms(np.array(seeds, dtype=np.uint64), count)
    assert drawn.dtype == np.float64
    assert drawn.tolist() == [[(number >> 11) / 2**53 for number in splitmix64(seed, count)] for seed in seeds]
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_uniforms_are_uniform() -> None:
    drawn = np.sort(uniforms(np.array([sample_seed(0, 0, f"row {i}", 0) for i in range(200)], dtype=np.uint64), 100).ravel())
    # Kolmogorov and Smirnov: with 20,000 numbers the largest gap is under 0.0138 but once in 1,000 times.
    assert np.abs(drawn - (np.arange(20_000) + 0.5) / 20_000).max() < 0.0138


@pytest.mark.parametrize("other", [(1, 2, "a", 3), (0, 3, "a", 3), (0, 2, "b", 3), (0, 2, "a", 4)])
def test_every_part_of_a_samples_name_changes_its_seed(other: tuple[int, int, str, int]) -> None:
    seed = sample_seed(0, 2, "a", 3)
    assert seed == sample_seed(0, 2, "a", 3)
    assert 0 <= seed < 2**64
    assert sample_seed(*other) != seed


def test_ten_thousand_samples_have_ten_thousand_seeds() -> None:
    names = [(seed, step, f"{row}", k) for seed in range(5) for step in range(10) for row in range(50) for k in range(4)]
    assert len({sample_seed(*name) for name in names}) == len(names) == 10_000
