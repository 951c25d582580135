from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor

from evengaze import methods
from evengaze.debias import Debias, Exponential, PaddingMask
from evengaze.errors import ConfigError
from evengaze.methods import registry
from evengaze.methods._template import Norm
from evengaze.methods.fastv import FastV
from evengaze.methods.himap import HiMAP
from evengaze.testing import tiny


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
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @dataclass(frozen=True)
    class Shouted(Norm):
        name: ClassVar[str] = "MyNorm"

    methods.register(methods.register(Shouted))
    assert methods.parse("MyNorm:keep=3") == Shouted(3)
    assert methods.from_dict(Shouted(3).to_dict()) == Shouted(3)


def test_the_template_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    assert methods.register(Norm) is Norm
    assert methods.parse("norm:keep=5") == Norm(5)


OUTSIDE = """
from dataclasses import dataclass
from evengaze import methods

@methods.register
@dataclass(frozen=True)
class Last(methods.OneStage):
    keep: float = 9
    name = "last-ones"
    attention = None

    def score(self, view):
        return view.tokens.x
"""


@pytest.fixture
def outside(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of somebody else's, and a registry that forgets it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "somebodys.py"
    path.write_text(OUTSIDE)
    yield path
    sys.modules.pop("somebodys", None)


def test_a_class_is_found_by_its_module(outside: Path) -> None:
    found = methods.parse("somebodys:Last:keep=12.5%,layer=3")
    assert (found.name, found.keep, found.layer) == ("last-ones", 0.125, 3)
    assert methods.parse(methods.spec(found)) == found and methods.parse("somebodys:Last") == methods.parse("last-ones")
    assert methods.split(["somebodys:Last,keep=4,fastv", "somebodys:Last:keep=3,layer=2;none"]) == (
        "somebodys:Last:keep=4",
        "fastv",
        "somebodys:Last:keep=3,layer=2",
        "none",
    )
    with pytest.raises(ConfigError, match=r"no class Lost.*Did you mean 'Last'"):
        methods.parse("somebodys:Lost")
    with pytest.raises(ConfigError, match="nobodys cannot be imported"):
        methods.parse("nobodys:Last")
    with pytest.raises(ConfigError, match="no method"):
        methods.parse("json:JSONDecoder")


@pytest.mark.parametrize("by", ["module", "file"])
def test_a_plugin_registers_its_methods(outside: Path, by: str) -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        methods.get("last-ones")
    methods.load("somebodys" if by == "module" else str(outside))
    assert methods.parse("last-ones:keep=4").keep == 4
    assert methods.names()[-1] == "last-ones"
    with pytest.raises(ConfigError, match="no such file"):
        methods.load(str(outside.with_name("other.py")))
    outside.with_name("broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"broken\.py cannot be imported \(ZeroDivisionError"):
        methods.load(str(outside.with_name("broken.py")))


def test_installed_packages_bring_methods_by_entry_points(outside: Path) -> None:
    info = outside.parent / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    points = "[evengaze.methods]\nlast-ones = somebodys:Last\nwrong = somebodys:Last\ngone = nowhere:Method\n"
    (info / "entry_points.txt").write_text(points)
    importlib.invalidate_caches()
    assert {"last-ones", "wrong", "gone"} <= set(methods.names())
    assert methods.parse("last-ones:keep=4").keep == 4
    with pytest.raises(ConfigError, match=r"'gone' comes from nowhere:Method, which fails"):
        methods.get("gone")
    with pytest.raises(ConfigError, match="whose name is 'last-ones'"):
        methods.get("wrong")


def test_a_class_that_is_defined_again_replaces_the_old_one(outside: Path) -> None:
    first = methods.load(str(outside)).Last
    second = methods.load(str(outside)).Last
    assert first is not second and methods.get("last-ones") is second


def test_files_import_nothing(outside: Path) -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        methods.from_dict({"method": "somebodys:Last"})
    assert "somebodys" not in sys.modules


@pytest.mark.parametrize(
    ("text", "meant"),
    [("fastvv", "fastv"), ("sparse-vlm", "sparsevlm"), ("fastv:kep=3", "keep"), ("pyramiddrop:layer=[2]", "layers")],
)
def test_bad_names_say_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{meant}'"):
        methods.parse(text)


def test_shares_may_be_written_in_per_cent() -> None:
    assert methods.parse("fastv:keep=12.5%") == FastV(0.125)
    assert methods.parse("himap:keep=[50%, 6 %]").keep == (0.5, 0.06)
    assert methods.parse("fastv:keep=100%").keep == 1.0
    with pytest.raises(ConfigError, match="neither a whole number"):
        methods.parse("fastv:keep=150%")


def test_every_method_of_the_package_is_registered_where_it_is_defined() -> None:
    found = [methods.get(name) for name in methods.names()]
    for module in registry.MODULES:
        assert any(cls.__module__.startswith(f"evengaze.methods.{module}") for cls in found), module
    assert len(found) == len(set(found)) == len(methods.names())


def test_a_method_of_many_stages_only_has_to_say_score() -> None:
    @dataclass(frozen=True)
    class Steps(methods.ManyStages):
        name: ClassVar[str] = "steps"

        def score(self, view: methods.View) -> Tensor:
            return view.attention(view.last)

    assert Steps().keep == (0.5, 0.25, 0.125) and [s.layer for s in Steps().stages(32)] == [8, 16, 24]
    assert Steps(keep=64, layers=(2, 4)).keep == (64, 32)
    model, inputs = tiny("llava")
    with Steps(keep=8, layers=(1, 2))(model) as run:
        model.generate(**inputs, max_new_tokens=2)
    assert [len(run.trace.kept(0, stage)) for stage in (0, 1)] == [8, 4]


def test_a_module_may_be_called_as_its_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.syspath_prepend(tmp_path)
    body = "name = {!r}\n    attention = None\n    def score(self, view): return view.tokens.x\n"
    classes = [
        f"@register\n@dataclass(frozen=True)\nclass {name}(OneStage):\n    {body.format(name.lower())}"
        for name in ("Brims", "Rims")
    ]
    head = "from dataclasses import dataclass\nfrom evengaze.methods import OneStage, register\n"
    (tmp_path / "brims.py").write_text(head + "\n".join(classes))
    for _ in range(2):  # the first time it is no method's name yet
        assert methods.spec(methods.parse("brims:Brims:keep=3")) == "brims:keep=3"
        assert methods.spec(methods.parse("brims:Rims:keep=3")) == "rims:keep=3"
    assert methods.find("brims:Rims") is methods.find("rims") is methods.get("Rims")
    with pytest.raises(ConfigError, match="not of the form key=value"):
        methods.parse("brims:keep")
    monkeypatch.delitem(sys.modules, "brims")
