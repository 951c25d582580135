"""docs/models.md says what its commands print: the tables there are of this version, and complete."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import transformers

from evengaze.models.support import CHECKED, all_support, model_types
from evengaze.testing import families
from evengaze.testing.coverage import names, table
from evengaze.testing.markdown import between

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
NEWEST = pytest.mark.skipif(not transformers.__version__.startswith("5.24"), reason="the page is of transformers 5.24")


def part(name: str) -> str:
    found = between(PAGE, name)
    assert found is not None
    return found


def rows(name: str) -> list[list[str]]:
    lines = [line for line in part(name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)[|]", line)[1:-1]] for line in lines[2:]]


@NEWEST
def test_every_type_is_there_and_counted() -> None:
    found = {row[0].strip("`"): row[1] for row in rows("coverage") if len(row) == 3}
    assert set(found) == set(model_types())
    assert {kind for kind, how in found.items() if how == "checked"} <= CHECKED
    counts = Counter(found.values())
    total = ", ".join(f"{counts[how]} {how}" for how in ("checked", "generic", "refused"))
    assert f"{len(found)} types: {total}." in part("coverage")


def test_names_that_people_type() -> None:
    assert part("coverage").endswith(names())


@NEWEST
@pytest.mark.parametrize(("name", "generic"), [("matrix", False), ("generic matrix", True)])
def test_the_matrix_is_whole_and_nothing_in_it_fails(name: str, generic: bool) -> None:
    assert {row[0] for row in rows(name)} == set(families(generic=generic))
    assert "fail**" not in part(name)


@NEWEST
@pytest.mark.slow
def test_what_is_said_of_every_type() -> None:
    assert part("coverage") == f"{table(list(all_support()))}\n\n{names()}"
