"""What can be done with latents."""
