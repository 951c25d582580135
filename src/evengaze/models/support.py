"""What is known of every model type of the installed transformers: checked, generic, or refused and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import transformers

from evengaze.errors import UnsupportedModelError
from evengaze.models.inspect import CannotBuildError, diagnose
from evengaze.models.registry import BareDecoder, adapter_for_type

How = Literal["checked", "generic", "refused"]

CHECKED = frozenset(
    {
        "apertus1p5",
        "aria",
        "aya_vision",
        "cohere2_vision",
        "cohere_compass",
        "cosmos3_edge",
        "cosmos3_omni",
        "deepseek_ocr2",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "ernie4_5_vl_moe",
        "exaone4_5",
        "fast_vlm",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "glm46v",
        "glmga",
        "glm4v",
        "glm4v_moe",
        "glm_ocr",
        "got_ocr2",
        "granite4_vision",
        "granite_docling",
        "hunyuan_vl",
        "hyperclovax_vision_v2",
        "idefics2",
        "idefics3",
        "internvl",
        "janus",
        "kimi_k25",
        "lfm2_vl",
        "lfm3_vl",
        "lighton_ocr",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "minicpm_ocr",
        "minicpmv4_6",
        "minicpmv4_7",
        "minimax_m3_vl",
        "mistral3",
        "molmo2",
        "muse_glimmer",
        "muse_spark",
        "nemotron_h_omni",
        "ovis2",
        "paddleocr_vl",
        "paligemma",
        "perception_lm",
        "pp_chart2table",
        "qianfan_ocr",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
        "shieldgemma2",
        "smolvlm",
        "step3p7",
        "video_llama_3",
        "video_llava",
        "vipllava",
    }
)
"""Model types whose tiny model passes the whole family matrix, in the release that the tests run with."""

_RELEASED = {"minimax_m3_vl": {"text_config": {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57}}}
"""What released checkpoints have and default configs do not, where it decides whether they can be pruned."""

_FAILING = {
    ("llama4", "5.24.0"): "the unpruned model ends in AttributeError: 'MoeCausalLMOutputWithPast' object has no "
    "attribute 'image_outputs'. With transformers 5.23 its tiny model passes a short row of the matrix",
}
"""Types that a release of transformers cannot run, pruned or not."""


@dataclass(frozen=True)
class Support:
    """One model type.

    Attributes:
        model_type: `config.model_type`.
        how: "checked" (see `CHECKED`), "generic" (all that the generic adapter needs is there), or "refused".
        adapter: name of the adapter; empty if refused.
        reason: why it is refused; empty else.
    """

    model_type: str
    how: How
    adapter: str = ""
    reason: str = ""


def model_types() -> tuple[str, ...]:
    """All image-text-to-text types of the installed transformers, and those that hub configs name for parts of them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names

    return tuple(sorted({*names, "qwen2_5_omni", "qwen3_omni_moe"}))


def how_supported(model_type: str) -> How:
    """How well a model type is known that an adapter serves."""
    return "checked" if model_type in CHECKED else "generic"


def failing(model_type: str, release: str = transformers.__version__) -> str | None:
    """Why a release of transformers cannot run a model type, pruned or not; None if nothing is known against it."""
    reason = _FAILING.get((model_type, release))
    return reason and f"transformers {release} cannot run {model_type!r} itself: {reason}."


def support(model_type: str) -> Support:
    """What is known of a model type, from its default config."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type](**_RELEASED.get(model_type, {}))
    except Exception as error:  # configs may lack defaults, or need packages
        said = " ".join(str(error).split())[:160]
        reason = f"transformers cannot make a default config of it: {type(error).__name__}: {said}"
        return Support(model_type, "refused", reason=reason)
    broken = failing(model_type)
    if broken is not None:
        return Support(model_type, "refused", reason=broken)
    config.model_type = model_type
    _shorten(config)
    try:
        found = diagnose(config)
    except CannotBuildError as error:
        if model_type in CHECKED:  # the tiny model has a config, or a stand-in for a tower of timm
            own = adapter_for_type(model_type)
            return Support(model_type, "checked", "generic" if own is None else own.name)
        return Support(model_type, "refused", reason=str(error))
    except UnsupportedModelError as error:
        return Support(model_type, "refused", reason=str(error))
    if isinstance(found.adapter, BareDecoder):
        return Support(
            model_type, "refused", reason="its default config has no vision side: say by hand where visual tokens are"
        )
    return Support(model_type, how_supported(model_type), found.adapter.name)


def all_support() -> Iterator[Support]:
    """`support` of every type."""
    for model_type in model_types():
        yield support(model_type)


def _shorten(config: Any) -> None:
    """Fewer experts: a default config may have hundreds in every layer, which are modules even without weights."""
    text = config.get_text_config()
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > 8:
            setattr(text, name, 8)
