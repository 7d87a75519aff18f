"""Tables of a document, generated from the code: between <!-- generated: NAME --> and <!-- end -->."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

Tables = Mapping[str, Callable[[], str]]


def renewed(text: str, tables: Tables) -> str:
    """`text` with the block of every table made anew."""
    for name, make in tables.items():
        block = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = block.subn(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
        assert count == 1, f"the document has no block {name!r}"
    return text


def main(document: Path, tables: Tables) -> None:
    """With --write the document is brought up to date, else the tables are printed."""
    if "--write" in sys.argv:
        document.write_text(renewed(document.read_text(), tables))
    else:
        print("\n\n".join(make() for make in tables.values()))
