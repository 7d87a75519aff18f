"""Latent diffusion models: from captioned images to pictures of your own model."""

__version__ = "0.1.0"
