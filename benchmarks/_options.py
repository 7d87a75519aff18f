"""The words key=value that a benchmark is called with, and how it ends when they are wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.errors import LdmError, check, nearest


def read_options(arguments: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with what is given, each value of its default's type. Raises LdmError, `CONFIG`, naming the word."""
    options = dict(defaults)
    for argument in arguments:
        key, _, value = argument.partition("=")
        check(key in options, "CONFIG", f"unknown key {key!r}", next=nearest(key, defaults))
        kind = type(defaults[key])
        try:
            options[key] = value.lower() == "true" if kind is bool else kind(value)
        except ValueError as problem:
            raise LdmError("CONFIG", f"cannot read {argument!r}", limit=str(problem)) from None
    return options


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """`main` with the words of the command; an error is one line and its exit code."""
    try:
        main(sys.argv[1:])
    except LdmError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
