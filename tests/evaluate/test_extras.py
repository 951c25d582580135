"""What the optional dependencies promise can be installed and imported."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_lmms_eval_comes_with_a_filelock_that_has_what_it_imports() -> None:
    """lmms-eval 0.7.3 imports `filelock._api`, which version 4 no longer has, and sets no bound itself."""
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = [Requirement(line) for line in extras["lmms-eval"]]
    assert not any(one.specifier.contains("4.0.0") for one in wanted if one.name == "filelock")
    assert any(one.name == "filelock" for one in wanted)
