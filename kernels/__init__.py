"""The operations that dominate memory traffic: plain references, and Triton kernels of them for CUDA tensors."""
