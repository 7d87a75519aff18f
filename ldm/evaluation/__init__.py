"""Judging models and autoencoders on a set of pictures."""
