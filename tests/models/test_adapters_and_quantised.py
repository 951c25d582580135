"""LoRA adapters, quantised weights and attention implementations, as `ModelSpec` names them; and hubs out of reach."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from evengaze import FastV
from evengaze.errors import ConfigError, DataError, MissingExtraError
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.models import hub, loading
from runner_fakes import save_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # read by peft


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    peft = pytest.importorskip("peft")
    model = Predictor.load(ModelSpec(str(folder), device="cpu")).model
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    path = tmp_path_factory.mktemp("adapter") / "lora"
    peft.get_peft_model(model, options).save_pretrained(path)
    return path


def logits(predictor: Predictor) -> torch.Tensor:
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        return predictor.model(input_ids=ids).logits


def test_an_adapter_changes_answers_and_the_fingerprint(folder: Path, lora: Path) -> None:
    plain = Predictor.load(ModelSpec(str(folder), device="cpu"))
    tuned = Predictor.load(ModelSpec(str(folder), device="cpu", adapter=str(lora)))
    assert type(plain.model) is type(tuned.model)
    assert (logits(plain) - logits(tuned)).abs().max() > 1e-3
    assert "adapter" not in plain.describe() and tuned.describe()["adapter"] == str(lora)
    assert tuned.describe()["adapter_files"] != str(lora)


def test_what_is_no_adapter_is_refused_by_name(folder: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no adapter_config\.json"):
        Predictor.load(ModelSpec(str(folder), device="cpu", adapter=str(tmp_path)))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    (tmp_path / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    with pytest.raises(DataError, match=r"adapter_model\.bin is a pickle"):
        Predictor.load(ModelSpec(str(folder), device="cpu", adapter=str(tmp_path)))


def test_attention_of_the_embedded_model() -> None:
    assert Predictor.load(ModelSpec("demo", device="cpu", attention="eager")).describe()["attention"] == "eager"
    with pytest.raises(ConfigError, match="attention 'nonsense' cannot be used"):
        Predictor.load(ModelSpec("demo", device="cpu", attention="nonsense"))


@pytest.mark.parametrize("name", sorted(loading.QUANTIZED))
def test_quantised_models_are_pruned(folder: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    found = Predictor.load(ModelSpec(str(folder), device="cpu", quantize=name))
    assert found.describe()["quantized"] == name
    layers = [m for m in found.model.modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")]
    assert layers
    with FastV(keep=4)(found.model):
        pass


def test_ways_to_quantise_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'3bit' does not exist; use 8bit or 4bit"):
        Predictor.load(ModelSpec(str(folder), device="cpu", quantize="3bit"))
    with pytest.raises(ConfigError, match="embedded model"):
        Predictor.load(ModelSpec("demo", device="cpu", quantize="8bit"))

    def missing(*_: Any) -> None:
        raise MissingExtraError("bitsandbytes")

    monkeypatch.setattr(loading, "require", missing)
    with pytest.raises(MissingExtraError):
        loading.quantization("8bit")


# -- the hub ---------------------------------------------------------------------------------------------------------
LOADERS = {
    "config": lambda: loading.load_config("nobody/nothing"),
    "processor": lambda: loading.load_processor("nobody/nothing"),
    "tokenizer": lambda: loading.load_tokenizer("nobody/nothing"),
    "model": lambda: loading.load_model(None, "nobody/nothing"),
}


@pytest.mark.parametrize("what", sorted(LOADERS))
def test_offline_is_said_at_once(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"nobody/nothing: there is no such folder.*HF_HUB_OFFLINE=1 is set"):
        LOADERS[what]()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("cached", [False, True])
def test_a_hub_out_of_reach_is_asked_once(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: "/there" if cached else None)
    hub._answers.cache_clear()
    for _ in range(2):
        if cached:
            hub.ensure_reachable("nobody/nothing")
        else:
            with pytest.raises(DataError, match=r"cannot be reached\. Connect to the network"):
                hub.ensure_reachable("nobody/nothing")
    assert len(asked) == 1 and asked[0][1] <= 10
    assert constants.HF_HUB_OFFLINE is cached  # the cache alone, from here on
    hub._answers.cache_clear()
