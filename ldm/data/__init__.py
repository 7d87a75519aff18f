"""Shards to batches. Knows nothing of models; `pipeline.py` lists the stages and is the one file to read."""
