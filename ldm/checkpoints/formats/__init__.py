"""Weights of other projects: how their files are read, and how their names and settings become ours and back.

Trees of tensors, key maps and plain settings; no class of a model is known here.
"""
