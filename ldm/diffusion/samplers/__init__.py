"""Samplers: small pure functions `(denoise, x, levels, *, noise, on_step, ...) -> x`, one file each."""
