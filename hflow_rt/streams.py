"""Random streams that keep no state: each is named by integers and always starts at its beginning."""

import numpy as np
import torch

__all__ = ["generator"]


def generator(*key: int) -> torch.Generator:
    """A fresh CPU generator whose stream depends on `key` (integers >= 0) alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
