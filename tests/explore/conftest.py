from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from evengaze.evaluate.predictor import ModelSpec


@pytest.fixture(scope="session")
def page() -> Iterator[Any]:
    """The explorer in this process, on the embedded model."""
    pytest.importorskip("gradio", reason="Gradio is not installed: `make test-explore` has an environment with it")
    from evengaze.explore.start import run

    shown = run(ModelSpec("demo"), port=0, block=False)
    yield shown
    shown.close()
