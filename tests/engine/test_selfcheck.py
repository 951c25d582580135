"""The self-check: what releases of the future may change is either served or an error that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama as llama

import evengaze as eg
from evengaze import compat
from evengaze.engine import selfcheck
from evengaze.errors import IncompatibleReleaseError, ReleaseWarning
from evengaze.testing import tiny


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call decoder layers by other argument names, as another release might."""

    def rename(**names: str) -> None:
        back = {new: old for old, new in names.items()}
        call, forward = llama.LlamaDecoderLayer.__call__, llama.LlamaDecoderLayer.forward

        def outside(self: Any, *args: Any, **kwargs: Any) -> Any:
            return call(self, *args, **{names.get(k, k): v for k, v in kwargs.items()})

        def inside(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **{back.get(k, k): v for k, v in kwargs.items()})

        monkeypatch.setattr(llama.LlamaDecoderLayer, "__call__", outside)
        monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", inside)

    monkeypatch.setattr(selfcheck, "_passed", False)
    return rename


def cache_name() -> str:
    return next(iter(compat.cache_argument(transformers.LlamaModel, None)))


def test_the_installed_release_passes() -> None:
    assert selfcheck.check() < selfcheck.TOLERANCE


def test_the_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    selfcheck.check()
    assert torch.equal(torch.rand(3), expected)


def test_arguments_that_say_what_they_are_may_have_any_name(renamed: Any) -> None:
    renamed(**{cache_name(): "memory", "attention_mask": "allowed", "position_embeddings": "rotations"})
    assert selfcheck.check() < selfcheck.TOLERANCE
    model, inputs = tiny("llava", batch=3)
    plain, _ = tiny("llava", batch=3)
    with eg.FastV(keep=5)(model):
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with eg.FastV(keep=5)(plain):
        assert torch.equal(tokens, plain.generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("name", ["position_ids", "cache"])
def test_a_release_that_breaks_pruning_is_named_before_anything_is_attached(
    renamed: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "cache":  # layers get it in a wrapping of their own
        forward, call = llama.LlamaDecoderLayer.forward, llama.LlamaDecoderLayer.__call__
        key = cache_name()

        def outside(self: Any, *args: Any, **kwargs: Any) -> Any:
            return call(self, *args, **{**kwargs, key: (lambda: kwargs[key])} if key in kwargs else kwargs)

        def inside(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **{**kwargs, key: kwargs[key]()} if callable(kwargs.get(key)) else kwargs)

        monkeypatch.setattr(llama.LlamaDecoderLayer, "__call__", outside)
        monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", inside)
    else:
        renamed(position_ids="where")
    model, inputs = tiny("llava")
    dense = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with pytest.raises(IncompatibleReleaseError, match=rf"transformers {transformers.__version__}") as caught:
        eg.attach(model, eg.FastV(keep=5))
    assert f"transformers=={compat.NEWEST}.*" in str(caught.value)
    monkeypatch.undo()
    assert torch.equal(model.generate(**inputs, max_new_tokens=2, do_sample=False), dense)


def test_an_untested_release_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("llava")
    monkeypatch.setattr(selfcheck, "_passed", False)
    monkeypatch.setattr(compat, "untested", lambda: "transformers 9.0 is newer")
    with pytest.warns(ReleaseWarning, match="newer") as seen:
        for _ in range(2):
            eg.attach(model, eg.FastV(keep=5)).remove()
    assert len([w for w in seen if w.category is ReleaseWarning]) == 1
    assert seen[0].filename == __file__


def test_which_releases_are_tested() -> None:
    assert compat.untested() is None, "raise compat.NEWEST after `make compat`"
    assert compat.untested(f"{compat.NEWEST}.7") is None
    assert "pip install -U evengaze" in str(compat.untested("99.0.0.dev0"))
    assert "pip install -U transformers" in str(compat.untested("5.4.0"))
