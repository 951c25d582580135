"""The public face: what it does not have, it says where to look for."""

from __future__ import annotations

from importlib import import_module

import pytest

import evengaze as eg


def found(path: str) -> object:
    """What a dotted path leads to."""
    module, _, name = f"evengaze.{path}".rpartition(".")
    try:
        return import_module(f"evengaze.{path}")
    except ModuleNotFoundError:
        return getattr(import_module(module), name)


@pytest.mark.parametrize("name", sorted(eg._ELSEWHERE))
def test_names_that_are_elsewhere_are_there(name):
    path = eg._ELSEWHERE[name].removesuffix(", private")
    assert found(path) is not None and name not in eg.__all__
    with pytest.raises(AttributeError, match=f"It is in evengaze.{path}"):
        getattr(eg, name)


def test_nearly_right_names_are_named():
    with pytest.raises(AttributeError, match="Did you mean 'SparseVLM'"):
        eg.SparseVlm  # noqa: B018
    assert not hasattr(eg, "__wrapped__") and not hasattr(eg, "something_else")


def test_every_export_exists():
    assert all(getattr(eg, name) is not None for name in eg.__all__) and set(dir(eg)) == set(eg.__all__)
