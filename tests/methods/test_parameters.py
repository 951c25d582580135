"""Parameters of methods: close types are taken, others are refused where the method is made, whoever wrote it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from fakes import select, view
from torch import Tensor

from evengaze import methods
from evengaze.debias import Debias, Exponential, PaddingMask, SinkMask
from evengaze.errors import ConfigError, CurveError
from evengaze.methods import Grouping, ManyStages, OneStage, Pruner, Selection, Stage, View
from evengaze.methods.fastv import FastV
from evengaze.methods.himap import HiMAP
from evengaze.methods.pyramiddrop import PyramidDrop
from evengaze.methods.sparsevlm import SparseVLM


class _Nothing:
    """Of no type that a parameter could have."""

    def __repr__(self) -> str:
        return "a thing"


def _parameters() -> list[tuple[str, str]]:
    return [(name, f.name) for name in methods.names() for f in dataclasses.fields(methods.get(name))]


@pytest.mark.parametrize(("name", "parameter"), _parameters())
def test_a_wrong_type_of_any_parameter_is_refused_by_name(name: str, parameter: str) -> None:
    method = methods.get(name)
    numeric = isinstance(getattr(method(), parameter), (int, float))
    for wrong in [_Nothing(), {"a": 1}, *([True, "2", torch.tensor(2), None] if numeric else [3j])]:
        with pytest.raises(ConfigError, match=rf"{name}: {parameter} must be .*, not ") as error:
            method(**{parameter: wrong})
        assert repr(wrong) in str(error.value)


@dataclass(frozen=True)
class Foreign(OneStage):
    """A method as another package would write it."""

    taps: tuple[int, ...] = (1,)
    pair: tuple[int, float] = (1, 0.5)
    power: float | None = None
    kind: Literal["soft", "hard"] = "soft"
    fast: bool = False
    mask: PaddingMask | None = None

    name: ClassVar[str] = "foreign"

    def score(self, view: View) -> Tensor:
        return view.attention(view.last)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"taps": "12"}, "taps must be a sequence of whole numbers, not '12'"),
        ({"taps": [1, 2.5]}, r"taps must be a sequence of whole numbers, not \[1, 2.5\]"),
        ({"pair": [1]}, "pair must be 2 values"),
        ({"power": "2"}, "power must be a number or None, not '2'"),
        ({"kind": "mild"}, "kind must be 'soft' or 'hard', not 'mild'"),
        ({"fast": 1}, "fast must be True or False, not 1"),
        ({"mask": 0.5}, "mask must be PaddingMask or None, not 0.5"),
        ({"layer": 2.0}, "layer must be a whole number, not 2.0"),
    ],
)
def test_methods_of_other_packages_are_checked_by_their_annotations(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"foreign: {message}"):
        Foreign(**values)


def test_numpy_and_json_values_become_plain_ones() -> None:
    made = Foreign(np.int64(24), np.int32(3), np.array([1, 2]), [np.int8(2), np.float32(0.5)], np.float64(2))
    assert made == Foreign(24, 3, (1, 2), (2, 0.5), 2.0)
    assert json.loads(json.dumps(made.to_dict()))["keep"] == 24
    assert FastV(np.float32(0.25)).keep == 0.25 and type(FastV(np.float32(0.25)).keep) is float
    assert type(FastV(np.int64(1)).keep) is int  # one token, not all of them
    assert PyramidDrop(np.array([0.5, 0.25, 0.125])) == PyramidDrop((0.5, 0.25, 0.125))
    assert json.dumps(SinkMask(np.float32(4)).to_dict()) == '{"ratio": 4.0}'


def test_an_annotation_for_type_checkers_only_is_not_checked() -> None:
    namespace: dict[str, Any] = {"OneStage": OneStage, "dataclass": dataclass, "__name__": __name__}
    source = (
        "@dataclass(frozen=True)\nclass Odd(OneStage):\n    extra: 'Unknown' = 3\n    name = 'odd'\n    score = None"
    )
    exec(source, namespace)
    assert namespace["Odd"](extra="anything").extra == "anything"
    with pytest.raises(ConfigError, match="keep must be"):
        namespace["Odd"](keep="anything")


# -- debias ----------------------------------------------------------------------------------------------------------
def test_debias_by_name_in_a_constructor(tmp_path: Path) -> None:
    assert FastV(debias="padding").debias == Debias(PaddingMask())
    assert FastV(debias="llava-1.5-7b/fastv") == methods.parse("fastv:debias=llava-1.5-7b/fastv")
    assert FastV().replace(debias="padding").debiasing == Debias(PaddingMask())
    for missing in ("nope", str(tmp_path / "none.json"), tmp_path / "none.json"):
        with pytest.raises(CurveError):
            FastV(debias=missing)
    with pytest.raises(ConfigError, match=r"debias must be a Debias, 'padding', a preset's name, a curve file"):
        FastV(debias=PaddingMask())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"sinks": {"foo": 1}},
        {"sinks": 5},
        {"sinks": {"ratio": "high"}},
        {"sinks": {"ratio": 0.5}},
        {"padding": []},
        {"padding": {"threshold": "half"}},
        {"padding": {"formula": ["pad"]}},
        {"trend": "steep"},
        {"trend": {"family": "exponential"}},
        {"origin": 3},
        {"origin": {"layer": "one"}},
        {"stages": ["first"]},
        {"other": 1},
        {3: 1},
        [1, 2],
        None,
    ],
)
def test_a_damaged_debias_dictionary_is_an_error_of_ours(values: Any) -> None:
    with pytest.raises((ConfigError, CurveError)):
        Debias.from_dict(values)


def test_a_debias_of_the_wrong_parts_is_refused() -> None:
    for wrong in ({"trend": 3}, {"padding": Exponential(1.0)}, {"sinks": PaddingMask()}, {"stages": "last"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Debias(**wrong)


# -- several stages --------------------------------------------------------------------------------------------------
def test_default_budgets_serve_any_number_of_stages() -> None:
    assert HiMAP(layers=(2,)).budgets == (288,)
    assert HiMAP(layers=(2, 4, 8)).budgets == (288, 72, 18)
    assert PyramidDrop(layers=(2, 4, 8, 9)).budgets == (0.32, 0.16, 0.08, 0.04)
    assert len(select(HiMAP(layers=(2,)), view((20, 20))).keep) == 288


def test_other_layers_share_out_what_was_given() -> None:
    assert HiMAP(keep=100).replace(layers=(2,)) == HiMAP(100, (2,))
    assert HiMAP(keep=100).replace(layers=(2, 5, 7)).budgets == (100, 25, 6)
    assert HiMAP().replace(layers=(3,)) == HiMAP(layers=(3,))
    with pytest.raises(ConfigError, match="2 entries for 1 stages"):
        HiMAP((5, 4)).replace(layers=(2,))


# -- any number of visual tokens -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("visual", [1, 2, 3, 7, 577, 1000, 2880, 12000])
def test_defaults_fit_any_number_of_visual_tokens(name: str, visual: int) -> None:
    entering = methods.get(name)().schedule(32, visual).entering
    assert 1 <= min(entering) <= max(entering) <= visual
    assert list(entering) == sorted(entering, reverse=True)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 1), (25, 24)])
@pytest.mark.parametrize("name", [n for n in methods.names() if n not in ("dense", "visionzip", "fastv-masked")])
def test_defaults_select_from_any_number_of_visual_tokens(name: str, grid: tuple[int, int]) -> None:
    seen = view(grid)
    kept = select(methods.get(name)(), seen).keep
    assert 1 <= len(kept) <= len(seen)


def test_sparsevlm_keeps_its_average_where_that_leaves_enough() -> None:
    for visual in (300, 577, 700):
        assert SparseVLM().schedule(32, visual).average == pytest.approx(128, abs=1)
    assert SparseVLM(640).schedule(32, 2880).average == pytest.approx(640, abs=1)
    large = [SparseVLM().budget(i, 10**6, 2880) for i in range(3)]
    assert large == [128, 64, 32]
    firsts = [SparseVLM().budget(0, 10**6, visual) for visual in range(577, 1200, 7)]
    assert firsts == sorted(firsts, reverse=True)  # no jump where the average comes out of reach
    assert [SparseVLM(mode="official").budget(i, 10**6, 2880) for i in range(3)] == [303, 110, 36]


# -- definitions -----------------------------------------------------------------------------------------------------
def test_a_stage_is_checked_where_it_is_made() -> None:
    for wrong in ({"attention": "prevous"}, {"layer": 2.5}, {"layer": "2"}, {"trims_below": "no"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Stage(**{"layer": 2, **wrong})
    assert Stage(np.int64(3)).layer == 3


def test_a_method_without_a_name_is_refused_where_it_is_defined() -> None:
    with pytest.raises(ConfigError, match="Nameless needs a name"):

        class Nameless(OneStage):
            def score(self, view: View) -> Tensor:
                return view.attention(view.last)

    class Unfinished(ManyStages):
        """Has no `score`, so nobody can make one."""

    class Groups(Grouping):
        """Has no `choose`."""

    with pytest.raises(TypeError, match="abstract"):
        Groups()  # type: ignore[abstract]


def test_a_method_that_reads_nobodys_attention_is_refused_where_it_is_defined() -> None:
    with pytest.raises(ConfigError, match="attention must be one of 'previous', 'own', not 'prevous'"):

        class Misspelt(OneStage):
            name = "misspelt"
            attention = "prevous"  # type: ignore[assignment]

            def score(self, view: View) -> Tensor:
                return view.attention(view.last)

    with pytest.raises(ConfigError, match="positions must be one of"):

        class Displaced(Pruner):
            name = "displaced"
            positions = "kept"  # type: ignore[assignment]

    class Fine(Grouping):
        name = "fine"

        def group(self, view: View, count: int) -> Selection:
            return Selection(torch.arange(count))

    assert Fine().attention is None
