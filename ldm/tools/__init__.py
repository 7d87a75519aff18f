"""The verbs of `python -m ldm`: one module each, with `main(argv) -> exit code`."""
