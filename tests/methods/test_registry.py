from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from evengaze import methods
from evengaze.debias import Debias, Exponential, PaddingMask
from evengaze.errors import ConfigError
from evengaze.methods._template import Norm
from evengaze.methods.fastv import FastV
from evengaze.methods.himap import HiMAP


@pytest.mark.parametrize("name", methods.names())
def test_names_specs_and_dictionaries_round_trip(name: str) -> None:
    pruner = methods.get(name)()
    assert pruner.name == name
    assert methods.parse(methods.spec(pruner)) == pruner
    assert methods.from_dict(json.loads(json.dumps(pruner.to_dict()))) == pruner


def test_values_are_read_as_json() -> None:
    assert methods.parse("fastv:keep=0.25,layer=3") == FastV(0.25, 3)
    assert methods.parse("himap:keep=[115,90],layers=[2,8]") == HiMAP((115, 90), (2, 8))
    assert methods.parse("FastV:mode=official").mode == "official"
    assert methods.spec(HiMAP((115, 90), (3, 8))) == "himap:keep=[115,90],layers=[3,8]"


def test_debias_by_name_and_in_dictionaries() -> None:
    padding = methods.parse("fastv:debias=padding")
    assert padding.debias == Debias(padding=PaddingMask())
    both = FastV(debias=Debias(PaddingMask(0.3), Exponential(1.5)))
    assert methods.from_dict(json.loads(json.dumps(both.to_dict()))) == both


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "unknown method"),
        ("fastv:keep", "key=value"),
        ("fastv:kept=3", "no parameter kept"),
        ("fastv:keep=0", "drop every visual token"),
        ("fastv:keep=-4", "drop every visual token"),
        ("fastv:keep=1.5", "neither a whole number"),
        ("fastv:keep=many", "must be a number"),
        ("fastv:layer=0", "no layer has run yet"),
        ("fastv:layer=-1", "0-based index"),
        ("fastv:mode=other", "mode must be"),
        ("himap:keep=[1,2,3]", "3 entries for 2 stages"),
        ("himap:layers=[8,2]", "must ascend"),
        ("pyramiddrop:keep=[0.5,0.25,0]", "drop every visual token"),
        ("tokencarve:balance=2", "balance"),
        ("tokencarve:balance=half", "balance"),
        ("illava:vision_drop=0", "vision_drop"),
        ("illava:vision_drop=some", "vision_drop"),
        ("illava:vision_layers=5", "vision_layers must be a sequence"),
        ("illava:vision_layers=[5,-1]", "0-based index"),
        ("random:seed=two", "seed"),
        ("fastv:keep=NaN", "drop every visual token"),
        ("fastv:debias=5", "debias must be"),
        ("fastv:keep=64,keep=32", "keep is given twice"),
        ("fastv:keep=64, keep = 64", "keep is given twice"),
        ("sparsevlm:layers=[]", "must be a sequence"),
    ],
)
def test_bad_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.parse(text)


@pytest.mark.parametrize("name", [n for n in methods.names() if n != "dense"])
def test_a_layer_outside_the_model_is_an_error(name: str) -> None:
    pruner = methods.get(name)
    far = (
        pruner(layers=(90, 91, 92)[: 2 if "himap" in name else 3])
        if "layers" in pruner.__dataclass_fields__
        else pruner(layer=90)
    )
    with pytest.raises(ConfigError, match="outside the model"):
        far.stages(32)


def test_sparsevlm_names_the_layers_that_were_given() -> None:
    with pytest.raises(ConfigError, match=r"layers=\(1, 3\).*outside the model.*0 to 3"):
        methods.parse("sparsevlm:keep=[6,3],layers=[1,3]").stages(4)


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("himap", 3),
        ("pyramiddrop", 4),
        ("sparsevlm", 4),
        ("himap:mode=official", 9),
        ("pyramiddrop:mode=official", 21),
        ("sparsevlm:mode=official", 17),
    ],
)
def test_default_layers_say_how_deep_a_decoder_must_be(text: str, least: int) -> None:
    pruner = methods.parse(text)
    at = [stage.layer for stage in pruner.stages(least)]
    assert at == sorted(set(at)) and at[-1] < least
    for depth in (1, least - 1):
        with pytest.raises(ConfigError, match=f"needs at least {least} decoder layers.*has {depth}; give layers="):
            pruner.stages(depth)


def test_dictionaries_need_a_method() -> None:
    with pytest.raises(ConfigError, match="'method' entry"):
        methods.from_dict({"keep": 3})


def test_registering_another_class_under_a_taken_name_is_refused() -> None:
    @dataclass(frozen=True)
    class Impostor(Norm):
        name: ClassVar[str] = "fastv"

    with pytest.raises(ConfigError, match="is taken"):
        methods.register(Impostor)


def test_names_of_registered_methods_are_looked_up_whatever_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))

    @dataclass(frozen=True)
    class Shouted(Norm):
        name: ClassVar[str] = "MyNorm"

    methods.register(methods.register(Shouted))
    assert methods.parse("MyNorm:keep=3") == Shouted(3)
    assert methods.from_dict(Shouted(3).to_dict()) == Shouted(3)


def test_the_template_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    assert methods.register(Norm) is Norm
    assert methods.parse("norm:keep=5") == Norm(5)
