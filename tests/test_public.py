"""The public face: what it does not have, it says where to look for."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest

import evengaze as eg
from evengaze.calibration.bias import Bias
from evengaze.calibration.observe import Observations
from evengaze.debias import (
    Curve,
    CurveWarning,
    Debias,
    Exponential,
    Isotonic,
    PaddingMask,
    Prior,
    RowsColumns,
    SinkMask,
    Table,
)
from evengaze.demo import make_dataset
from evengaze.demo.model import FOLDER
from evengaze.evaluate.samples import Source
from evengaze.testing import tiny


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


def _printed():
    """What users print, as large as it gets."""
    many = tuple(float(i + 1) for i in range(500))
    curve = Curve.load(FOLDER.parent / "curves" / "fastv.json")
    debias, trends = Debias.of(curve), [Isotonic(tuple(i / 500 for i in range(500)), many), Table(many), Prior(many)]
    model, inputs = tiny("llava")
    with eg.FastV(keep=4, debias=debias)(model) as run:
        model.generate(**inputs, max_new_tokens=1)
    observed = Observations({"method": "fastv"}, "", "attention", {}, ["0123456789ab"] * 500)
    source = Source.of(None, model="demo")
    trace = run.trace
    yield from (curve, debias, eg.FastV(debias=debias), *trends, RowsColumns(many, many), Debias(trend=trends[0]))
    yield from (trace, trace.stages[0].rows[0], observed, Bias.of(observed), source, make_dataset("eval", 1)[0])


def test_what_is_printed_is_short():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurveWarning)  # the curve is another model's
        printed = list(_printed())
    assert not [type(one).__name__ for one in printed if max(len(str(one)), len(repr(one))) > 800]
    debias = next(one for one in printed if isinstance(one, Debias))
    assert str(debias) == "isotonic trend of fastv at layer 1 on demo divided out; padding left out"
    assert repr(debias) == f"<Debias: {debias}>"
    sparing = Debias(padding=PaddingMask(0.25), trend=Exponential(1.5), sinks=SinkMask(4), stages="all")
    assert str(sparing) == (
        "Exponential(sigma=1.5, mu=1.0) divided out; PaddingMask(threshold=0.25, formula='share') left out; registers "
        "above 4 times the median norm left out; at all stages"
    )
    assert str(Debias()) == "nothing removed"
