"""Random numbers that depend on a tensor's name and an entry's place in it, on nothing else.

So they are the same in whatever parts, order and threads a tensor is worked on.
"""

from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 8  # random numbers of 32 bits for each step of the generator's counter


def random_numbers(key: str, start: int, stop: int) -> NDArray[np.uint32]:
    """The random number of each of the places start..stop, found without those before them: the generator
    counts, and the count is set.

    Args:
        key: what the numbers are of, such as a seed and a tensor's name; other keys give others.
        start: the first place.
        stop: the place after the last.
    """
    first = start // _BLOCK
    steps = -(-stop // _BLOCK) - first
    digest = blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"), counter=first)
    # The raw numbers are what numpy promises never to change.
    drawn = np.asarray(generator.random_raw(steps * _BLOCK // 2)).astype("<u8", copy=False).view("<u4")
    return drawn[start - first * _BLOCK : stop - first * _BLOCK]


def random_groups(key: str, start: int, stop: int, groups: int) -> Tensor:
    """To which of so many groups, equally likely, each of the places start..stop belongs; int64.

    Args:
        key: what the split is of, such as a seed and a tensor's name; other keys split otherwise.
        start: the first place.
        stop: the place after the last.
        groups: how many.
    """
    numbers = random_numbers(key, start, stop).astype(np.int64)
    return torch.from_numpy((numbers * groups) >> 32)
