"""A selection of the recorded cases; `run.py --data` compares with any other folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from parity.run import check, main, suite

DATA = Path(__file__).parent / "data"
torch.set_num_threads(1)


@cache
def cases_of(name: str, attention: str = "eager") -> Any:
    return suite(DATA / name, attention)


def every() -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}-{cases_of(name).name(case)}")
        for name in ("set_a", "set_b")
        for case in cases_of(name).cases()
    ]


@pytest.mark.parametrize(("name", "case"), every())
def test_recorded_case(name: str, case: dict[str, Any]) -> None:
    assert check(cases_of(name), case) == []


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_recorded_case_with_sdpa(method: str) -> None:
    cases = cases_of("set_a", "sdpa")
    case = next(c for c in cases.cases() if c["method"] == method and c.get("image_size"))
    assert check(cases, case) == []


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(DATA / "set_b"), "--method", "himap", "--case", "g8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"
