from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from evengaze import demo


@pytest.fixture(scope="session")
def predictor() -> Any:
    from evengaze.evaluate.predictor import ModelSpec, Predictor

    return Predictor.load(ModelSpec("demo"))


@pytest.fixture(scope="session")
def scenes() -> list[demo.DemoImage]:
    return demo.make_dataset("eval", 24)


@pytest.fixture(scope="module")
def server(predictor: Any) -> Iterator[Any]:
    from serve.serving import serving

    with serving(predictor) as running:
        yield running
