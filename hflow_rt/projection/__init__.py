"""Latents of images by search, for models that have no inverse."""
