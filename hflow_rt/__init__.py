"""hflow-rt: train latent-variable image models, export them, run them, and prove the engines are the model."""

__version__ = "0.1.0"
