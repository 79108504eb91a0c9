"""Random choices that are pure functions: of a text and a seed, or of a place and a seed.

Nothing here has a state or a history. What is drawn for one document does not depend on those before it, so an
interrupted preparation goes on as if nothing had happened; what stands at one place of a shuffled order does not
depend on how far it was read. Written out instead of taken from numpy or `random`, whose streams may change
between versions, and with them the batches of a resumed run.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it lie far apart
_ROUNDS = 6


def digest(text: str, seed: int) -> int:
    """A uniform 64-bit number that depends on all of `text` and on `seed`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest())


def uniform(key: int, index: np.ndarray) -> np.ndarray:
    """Float64 numbers in [0, 1), one for each `index` (uint64, any shape) under the 64-bit `key`."""
    return (mix(mix(np.full_like(index, key)) ^ index) >> np.uint64(11)) * 2.0**-53


def shuffled(position: np.ndarray, epoch: np.ndarray, count: int, seed: int) -> np.ndarray:
    """What stands at `position` when 0 ... `count` - 1 are shuffled for `epoch`. All arrays uint64, [...].

    A Feistel network: it permutes the numbers of an even count of bits whatever its round function is, so the
    order needs no memory. Results at or past `count` are permuted again until they are below (cycle walking),
    which leaves a permutation of the numbers below.
    """
    # At least 3 bits a half: over smaller domains a Feistel network reaches too few of the permutations.
    half = np.uint64(max(3, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = mix(mix(np.full_like(position, seed % 2**64)) + epoch)
    round_keys = [mix(key + np.uint64(round_)) for round_ in range(_ROUNDS)]
    result = position.copy()
    outside = np.ones(position.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(round_key[outside] ^ right) & mask)
        result[outside] = left << half | right
        outside = result >= count
    return result


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers in which each bit of the input moves about half of the output's (splitmix64)."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
