"""`evengaze doctor`, and folders in the hub's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForImageTextToText, Kosmos2Config, MllamaConfig
from typer.testing import CliRunner

from evengaze.cli import doctor
from evengaze.errors import ConfigError
from evengaze.methods import get
from evengaze.models import registry
from evengaze.models.inspect import diagnose, skeleton
from evengaze.testing import families, tiny
from evengaze.testing.matrix import METHODS, greedy

FAMILIES = [f for f in families() if f != "llama"]


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    doctor.register(app)
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.parametrize("family", families())
def test_diagnosis(family: str) -> None:
    model, _ = tiny(family)
    found = diagnose(model.config)
    assert found.depth == 6
    module: Any = model
    for name in found.layers.split("."):
        module = getattr(module, name)
    assert len(module) == 6
    assert {"eager", "sdpa"} <= set(found.attention)
    assert ("flash_attention_2" in found.attention) == (family not in ("gemma3", "paligemma"))
    assert any("vision tower" in line for line in found.cannot) == (family not in ("llava", "video_llava", "paligemma"))


def test_output(tmp_path: Path) -> None:
    model, _ = tiny("gemma3")
    model.config.save_pretrained(tmp_path)
    result = run(str(tmp_path))
    assert result.exit_code == 0
    assert "Gemma 3" in result.output
    assert "model.language_model.layers (6)" in result.output
    assert "use layer=2, 4" in result.output


def test_json(tmp_path: Path) -> None:
    model, _ = tiny("qwen3_vl")
    model.config.save_pretrained(tmp_path)
    found = json.loads(run(str(tmp_path), "--json").output)
    assert found["supported"] is True
    assert found["adapter"] == "Qwen3-VL"
    assert any(line.startswith("renumbered positions") for line in found["cannot"])


def test_unknown_family_gets_a_skeleton_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kosmos2Config().save_pretrained(tmp_path)
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert "no adapter for config.model_type 'kosmos-2'" in result.output
    code = result.output.partition("# An adapter to fill in:")[2]
    assert code.strip() == skeleton("kosmos-2").strip()
    monkeypatch.setattr(registry, "_registered", {})
    exec(code, {})
    adapter = registry.adapter_for_type("kosmos-2")
    assert adapter is not None
    assert adapter.name == "kosmos-2"


def test_refused_family_says_why(tmp_path: Path) -> None:
    MllamaConfig().save_pretrained(tmp_path)
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert "cross-attention" in result.output
    assert "class" not in result.output  # no skeleton: an adapter would not help
    assert json.loads(run(str(tmp_path), "--json").output)["supported"] is False


def test_no_config() -> None:
    result = run("./no-such-folder")
    assert isinstance(result.exception, ConfigError)
    assert "no folder" in str(result.exception)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder(family: str, tmp_path: Path) -> None:
    """A model saved and loaded again prunes as before."""
    model, inputs = tiny(family)
    pruner = get("fastv")(**METHODS["fastv"])
    with pruner(model):
        tokens, logits = greedy(model, inputs)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    with pruner(again):
        same_tokens, same_logits = greedy(again, inputs)
    assert torch.equal(tokens, same_tokens)
    torch.testing.assert_close(logits, same_logits, atol=1e-3, rtol=0)
