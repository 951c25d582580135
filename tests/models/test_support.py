"""What doctor says of model types and of checkpoints in other formats: no false yes, no raw exception, no code run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from transformers import LlavaConfig

from evengaze.errors import DataError, UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.methods import get
from evengaze.models.inspect import diagnose
from evengaze.models.refusals import KNOWN_NAMES, instead_of
from evengaze.models.support import CHECKED, failing, model_types, support
from evengaze.testing.coverage import checked_types, names, table
from models.test_doctor import run


def test_checked_types_are_those_of_the_tiny_models() -> None:
    broken = {kind for kind in checked_types() if failing(kind, "5.24.0")}  # in the release that CHECKED speaks of
    assert checked_types() - broken <= CHECKED
    if transformers.__version__.startswith("5.24"):
        assert checked_types() == CHECKED


@pytest.mark.parametrize(
    ("model_type", "how", "said"),
    [
        ("qwen3_5", "checked", "generic"),
        ("llava", "checked", "LLaVA-1.5"),
        ("fast_vlm", "checked", "generic"),
        ("chameleon", "refused", "cannot build a model"),
        ("mistral4", "refused", "no vision side"),
        ("qwen2_5_omni", "refused", "Qwen2_5OmniThinkerForConditionalGeneration"),
        ("mllama", "refused", "cross-attention"),
        ("dots3_note", "refused", "attends sparsely"),
        ("inkling_mm_model", "refused", "convolution"),
        ("florence2", "refused", "encoder-decoder"),
        ("pi0", "refused", "no decoder layers"),
        ("granite4_vision", "checked", "Granite 4 Vision"),
    ],
)
def test_what_is_said_of_a_type(model_type: str, how: str, said: str) -> None:
    if model_type not in model_types():
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    found = support(model_type)
    assert found.how == how
    assert said in (found.adapter or found.reason)


def test_a_release_that_cannot_run_a_type_is_named() -> None:
    assert "image_outputs" in (failing("llama4", "5.24.0") or "")
    assert failing("llama4", "5.23.0") is None
    if transformers.__version__ == "5.24.0":
        assert support("llama4").how == "refused"


def test_the_original_llava_format_is_refused_by_name(tmp_path: Path) -> None:
    config = LlavaConfig(mm_vision_tower="openai/clip-vit-large-patch14-336", architectures=["LlavaLlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"original format.*Load llava-hf/llava-1\.5-13b-hf"):
        diagnose(config, "liuhaotian/llava-v1.5-13b")
    config.save_pretrained(tmp_path)
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert "original format" in " ".join(result.output.split())


def test_code_of_a_checkpoint_is_never_asked_for(tmp_path: Path) -> None:
    content = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration_internvl_chat.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "configuration_internvl_chat.py").write_text("raise SystemExit('code of the checkpoint was run')")
    result = run(str(tmp_path))
    assert isinstance(result.exception, DataError)
    assert "does not run" in str(result.exception)


def test_names_that_people_type() -> None:
    assert instead_of("liuhaotian/llava-v1.5-7b") == "llava-hf/llava-1.5-7b-hf"
    assert instead_of("OpenGVLab/InternVL3-8B") == "OpenGVLab/InternVL3-8B-hf"
    assert instead_of("OpenGVLab/InternVL3-8B-hf") is None
    assert instead_of("Qwen/Qwen3.5-27B") is None
    assert all(instead_of(name) and name in names() for name in KNOWN_NAMES)


def test_sparse_attention_is_refused_with_a_layout_by_hand_too() -> None:
    from evengaze.testing.generic.parts import LATENT, ROUTED
    from evengaze.testing.recipes import TEXT

    if "DeepseekV32Config" not in dir(transformers):
        pytest.skip("no DeepSeek-V3.2 in this release")
    sizes = {k: v for k, v in {**TEXT, **ROUTED, **LATENT}.items() if k != "head_dim"}
    config = transformers.DeepseekV32Config(**sizes, index_topk=6, index_head_dim=16, index_n_heads=2)
    model = transformers.DeepseekV32ForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="attends sparsely: an indexer"):
        get("fastv")(keep=2, layer=2)(model, layout=VisualLayout.from_spans([(1, 5)], grid=(2, 2)))


def test_the_table_counts() -> None:
    rows = [support("llava"), support("mllama")]
    text = table(rows)
    assert "| `llava` | checked | LLaVA-1.5 |" in text
    assert text.endswith("2 types: 1 checked, 0 generic, 1 refused.")
