"""Instance normalisation with the unbiased variance and epsilon inside the root (hflow spec 2.6)."""

import torch
from torch import Tensor

__all__ = ["EPSILON", "instance_norm"]

EPSILON = 1e-6


def instance_norm(x: Tensor) -> Tensor:
    """`[B, C, H, W]`: each sample and channel to mean 0 and unit unbiased variance over space. H W must exceed 1."""
    if x.dtype in (torch.float16, torch.bfloat16):  # statistics in float32
        return instance_norm(x.float()).to(x.dtype)
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPSILON)
