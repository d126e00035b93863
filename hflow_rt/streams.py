"""Random streams that keep no state: each is named by integers and always starts at its beginning."""

import numpy as np
import torch

__all__ = ["generator", "stream_seed"]


def stream_seed(*key: int) -> int:
    """The seed of the stream that `key` (integers >= 0) names."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key: int) -> torch.Generator:
    """A fresh CPU generator whose stream depends on `key` alone."""
    return torch.Generator().manual_seed(stream_seed(*key))
