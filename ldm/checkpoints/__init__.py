"""Checkpoints that survive kills, full disks and flipped bits, and the folder of a run."""
