"""NVAE: a deep hierarchical variational autoencoder (Vahdat & Kautz, NeurIPS 2020)."""
