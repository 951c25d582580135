"""Which adapter serves which model, and how others join."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig, T5Config

from evengaze.errors import ConfigError, UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.methods import get
from evengaze.models import BUILT_IN, Adapter, BareDecoder, Call, adapter_for, adapter_for_type, register, registry
from evengaze.testing import families, tiny


class Toy(Adapter):
    """An adapter from outside."""

    name = "Toy"
    model_types = ("toy_vlm",)

    def layout(self, model: Any, call: Call) -> VisualLayout | None:
        return None


class Holder(torch.nn.Module):
    """A model with nothing but a config."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.parametrize("model_type", BUILT_IN)
def test_built_in(model_type: str) -> None:
    adapter = adapter_for_type(model_type)
    assert adapter is not None
    assert model_type in adapter.model_types
    assert adapter is adapter_for_type(model_type)


@pytest.mark.parametrize("family", families())
def test_tiny_models_are_served(family: str) -> None:
    model, _ = tiny(family)
    adapter = adapter_for(model)
    assert isinstance(adapter, BareDecoder) == (family == "llama")
    assert len(adapter.decoder(model).layers) == 6  # type: ignore[arg-type]
    assert adapter_for(model.base_model).name == adapter.name
    expected = (1, 3, 5) if family in ("gemma3", "aya_vision") else tuple(range(6))
    assert adapter.full_attention_layers(model) == expected


def test_register() -> None:
    register(Toy)
    assert isinstance(adapter_for_type("toy_vlm"), Toy)
    with pytest.raises(ConfigError, match="no Adapter with model_types"):
        register(BareDecoder)


def test_registered_adapter_replaces_a_built_in_one() -> None:
    class Mine(Toy):
        model_types = ("llava",)

    register(Mine())
    assert isinstance(adapter_for_type("llava"), Mine)


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("toy_vlm", f"{__name__}:Toy", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group, name: [point] if name == "toy_vlm" else [])
    assert isinstance(adapter_for_type("toy_vlm"), Toy)
    assert adapter_for_type("other") is None


def test_unknown_family_names_what_was_looked_for() -> None:
    from transformers import AriaConfig

    with pytest.raises(UnsupportedModelError, match=r"'aria'.*evengaze\.adapters.*register\(\)"):
        adapter_for(Holder(AriaConfig()))


def test_cross_attention_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="cross-attention layers"):
        adapter_for(Holder(MllamaConfig()))


def test_encoder_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        adapter_for(Holder(T5Config()))


def test_no_transformers_model() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type"):
        adapter_for(torch.nn.Linear(2, 2))


def test_bare_decoder_has_no_layout_of_its_own() -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    model = LlamaForCausalLM(config)
    assert adapter_for(model).layout(model, Call(None, None, 0, [])) is None


def test_layers_with_a_narrow_window() -> None:
    """Layer 2 of the tiny Gemma 3 sees 12 tokens; the prompt has more."""
    model, inputs = tiny("gemma3")
    with pytest.warns(UserWarning, match=r"layers \[2\], which see only the last 12 of 28 tokens.*layers 1, 3, 5"):
        greedy_once(model, inputs, layer=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        greedy_once(model, inputs, layer=2)


def test_window_of_all_layers() -> None:
    model, inputs = tiny("llava_next", sliding_window=20)
    assert adapter_for(model).full_attention_layers(model) == ()
    with pytest.warns(UserWarning, match="no layer of this model sees more"):
        greedy_once(model, inputs, layer=2)


def greedy_once(model: Any, inputs: dict[str, torch.Tensor], layer: int) -> None:
    with torch.no_grad(), get("fastv")(keep=5, layer=layer)(model):
        model(**inputs)


TOWERS = ("llava", "video_llava", "paligemma")


@pytest.mark.parametrize("family", [f for f in families() if f != "llama"])
def test_vision_tower(family: str) -> None:
    model, inputs = tiny(family)
    adapter = adapter_for(model)
    if family not in TOWERS:
        with pytest.raises(UnsupportedModelError, match="in the decoder instead"):
            adapter.vision_tower(model)
        return
    tower = adapter.vision_tower(model)
    assert tower.special == (family != "paligemma")
    states: list[Any] = []
    handle = tower.layers[tower.output - 1].register_forward_hook(
        lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model.base_model.get_image_features(inputs["pixel_values"])
    handle.remove()
    assert states[0].shape[1] == tower.special + 16

    def features() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack(list(model.base_model.get_image_features(inputs["pixel_values"]).pooler_output))

    # The layers from `output` on have no influence on the features.
    before = features()
    for layer in tower.layers[tower.output :]:
        for p in layer.parameters():
            p.data.zero_()
    assert torch.equal(before, features())


def test_vision_tower_of_videos() -> None:
    model, _ = tiny("video_llava", video=True)
    adapter = adapter_for(model)
    assert adapter.vision_tower(model, "video").module is model.base_model.video_tower
