"""Which model types of the installed transformers can be pruned, and how that is known.

`python -m evengaze.testing.coverage` prints a table and its counts; `--write FILE` puts them between the marks of a
Markdown file; `--types` prints the types that tiny models stand for.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from evengaze.models.refusals import KNOWN_NAMES, instead_of
from evengaze.models.support import How, Support, all_support
from evengaze.testing.families import FAMILIES
from evengaze.testing.generic import GENERIC
from evengaze.testing.markdown import put_between


def checked_types() -> frozenset[str]:
    """The model types of all tiny models that the installed transformers has."""
    tiny = {n: f for n, f in {**FAMILIES, **GENERIC}.items() if f.runs and not f.bare}
    return frozenset(family.config({}).model_type for family in tiny.values())


def table(rows: list[Support]) -> str:
    """A Markdown table, refused types last, and the counts."""
    order: tuple[How, ...] = ("checked", "generic", "refused")
    lines = ["| model type | pruning | adapter, or why not |", "|---|---|---|"]
    for row in sorted(rows, key=lambda r: (order.index(r.how), r.model_type)):
        lines.append(f"| `{row.model_type}` | {row.how} | {_short(row.adapter or row.reason)} |")
    counts = Counter(row.how for row in rows)
    total = f"{len(rows)} types: " + ", ".join(f"{counts[how]} {how}" for how in order) + "."
    return "\n".join([*lines, "", total])


def names() -> str:
    """A Markdown table of hub ids that people type and what to load instead."""
    lines = ["| hub id | load |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | `{instead_of(name)}` |" for name in KNOWN_NAMES)])


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= 200 else line[:200].rsplit(" ", 1)[0] + " ..."


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="python -m evengaze.testing.coverage", description=__doc__)
    parser.add_argument("--write", type=Path, help="a Markdown file with marks around the table")
    parser.add_argument("--types", action="store_true", help="the types of all tiny models, one a line")
    options = parser.parse_args()
    if options.types:
        print("\n".join(sorted(checked_types())))
        return
    text = f"{table(list(all_support()))}\n\n{names()}"
    if options.write is None:
        print(text)
    else:
        put_between(options.write, "coverage", text)


if __name__ == "__main__":
    main()
