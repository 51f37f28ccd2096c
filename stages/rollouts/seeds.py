"""Randomness that belongs to a sample, not to a batch: the same sample is drawn however the batch is laid out (contract 16)."""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample_seed(seed: int, step: int, prompt: str, sample: int) -> int:
    """A sample's own 64-bit seed, from (seed, step, prompt, sample)."""
    name = f"{seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def uniforms(seeds_B: np.ndarray, count: int) -> np.ndarray:
    """uniforms_BT: float64 in [0, 1), the first `count` numbers of each seed's own stream (SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = seeds_B.astype(np.uint64)[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64)[None]
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
