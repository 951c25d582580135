"""What cannot be pruned exactly, told by what a model is made of, and what checkpoints that people name should be."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from evengaze.errors import UnsupportedModelError

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")


def refuse_decoder(decoder: nn.Module) -> None:
    """Raise an UnsupportedModelError if a decoder mixes tokens in a way that dropping some of them would change.

    A layer must mix tokens by attention with a mask, or by a state that runs through the sequence, not by both.
    """
    reason = why_not_decoder(decoder)
    if reason is not None:
        raise UnsupportedModelError(reason)


_BY_ITSELF = (
    "its generate() encodes pictures by itself and hands embeddings to a model inside, where nobody sees which of them "
    "are a picture's. Say it by hand: pruner(model, layout=VisualLayout.from_spans(spans, grid))"
)
_BY_TYPE = {
    "blip-2": _BY_ITSELF,
    "instructblip": _BY_ITSELF,
    "instructblipvideo": _BY_ITSELF,
    "unlimited_ocr": "its cache keeps the prompt and a window behind it in layers of a class of its own",
}
"""Types that cannot be pruned for a reason that their modules do not show."""


def refuse_type(kind: str) -> None:
    """Raise an UnsupportedModelError if a model type is known not to be prunable."""
    if kind in _BY_TYPE:
        raise UnsupportedModelError(f"{kind!r} cannot be pruned: {_BY_TYPE[kind]}.")


def why_not_decoder(decoder: nn.Module) -> str | None:
    """The reason, None if there is none."""
    name = type(decoder).__name__
    for layer in decoder.get_submodule("layers").children():
        attends = any(isinstance(getattr(layer, a, None), nn.Module) for a in _ATTENTION)
        for path, module in layer.named_modules():
            kind = type(module).__name__
            if "Indexer" in kind:
                return (
                    f"{name} attends sparsely: an indexer ({kind}) chooses among all tokens of the sequence which ones "
                    "a query sees, and later layers may go by the same choice. Among the tokens that pruning leaves it "
                    "chooses others than the model would, so that a pruned answer would not be exact."
                )
            if attends and "Conv" in kind and kind != "Conv1D":  # which is linear
                return (
                    f"{name}: its attention layers also mix neighbouring tokens by convolution ({path}: {kind}), "
                    "outside of any mask. Tokens that pruning leaves would get new neighbours, and stand-ins would be "
                    "mixed in."
                )
    return None


def why_not_videos(model: nn.Module) -> str | None:
    """Why videos cannot be pruned where pictures can; None if they can (Nemotron Omni's efficient video sampling)."""
    rate = getattr(model, "video_pruning_rate", 0)
    if not rate:
        return None
    return (
        f"videos: the model drops {rate:.0%} of their tokens by itself, in front of its decoder, whose sequence is "
        "another than that of the prompt. Set model.video_pruning_rate = 0 to prune by a method of evengaze"
    )


_KNOWN: tuple[tuple[str, str, str], ...] = (
    ("liuhaotian/llava-v1.5-7b", r"liuhaotian/llava-v1\.5-(7b|13b)", r"llava-hf/llava-1.5-\1-hf"),
    ("liuhaotian/llava-v1.6-vicuna-7b", r"liuhaotian/llava-v1\.6-vicuna-(7b|13b)", r"llava-hf/llava-v1.6-vicuna-\1-hf"),
    ("liuhaotian/llava-v1.6-mistral-7b", r"liuhaotian/llava-v1\.6-mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf"),
    ("liuhaotian/llava-v1.6-34b", r"liuhaotian/llava-v1\.6-34b", "llava-hf/llava-v1.6-34b-hf"),
    ("lmms-lab/llama3-llava-next-8b", "lmms-lab/llama3-llava-next-8b", "llava-hf/llama3-llava-next-8b-hf"),
    ("lmms-lab/LLaVA-NeXT-Video-7B", "lmms-lab/LLaVA-NeXT-Video-(7B|34B)", r"llava-hf/LLaVA-NeXT-Video-\1-hf"),
    (
        "lmms-lab/llava-onevision-qwen2-7b-ov",
        r"lmms-lab/llava-onevision-qwen2-(0\.5b|7b|72b)-(ov|si)",
        r"llava-hf/llava-onevision-qwen2-\1-\2-hf",
    ),
    ("LanguageBind/Video-LLaVA-7B", "LanguageBind/Video-LLaVA-7B", "LanguageBind/Video-LLaVA-7B-hf"),
    ("OpenGVLab/InternVL3-8B", "OpenGVLab/InternVL3-(1B|2B|8B|9B|14B|38B|78B)", r"OpenGVLab/InternVL3-\1-hf"),
    ("OpenGVLab/InternVL3_5-8B", r"OpenGVLab/InternVL3_5-([\w.]+B)", r"OpenGVLab/InternVL3_5-\1-HF"),
    ("stepfun-ai/GOT-OCR2_0", "stepfun-ai/GOT-OCR2_0", "stepfun-ai/GOT-OCR-2.0-hf"),
    (
        "deepseek-ai/deepseek-vl-7b-chat",
        r"deepseek-ai/deepseek-vl-(1\.3b|7b)-(base|chat)",
        r"deepseek-community/deepseek-vl-\1-\2",
    ),
    ("AIDC-AI/Ovis2-8B", "AIDC-AI/Ovis2-(1B|2B|4B|8B|16B|34B)", r"thisisiron/Ovis2-\1-hf"),
)
"""An example, the pattern of checkpoints in a format of their own, and the same weights in transformers' format."""

KNOWN_NAMES = tuple(example for example, _, _ in _KNOWN)
"""Hub ids that people type, of which `instead_of` knows what to load."""


def instead_of(source: str) -> str | None:
    """The hub id in transformers' format of a checkpoint that has a format of its own; None if it is not known."""
    for _, pattern, target in _KNOWN:
        found = re.fullmatch(pattern, source)
        if found is not None:
            return found.expand(target)
    return None


def refuse_format(config: Any, source: str = "") -> None:
    """Raise an UnsupportedModelError if a config is in a format that transformers' model class would misread, or that
    of a model around the one that can be pruned."""
    kind = getattr(config, "model_type", "?")
    refuse_type(kind)
    other = instead_of(source)
    advice = f" Load {other} instead, the same weights in transformers' format." if other else ""
    architectures = getattr(config, "architectures", None) or ()
    if getattr(config, "mm_vision_tower", None) is not None:
        raise UnsupportedModelError(
            f"this config ({', '.join((repr(kind), *architectures))}) is in LLaVA's original format, which "
            f"transformers' class of that type misreads.{advice or ' Look for a checkpoint whose name ends in -hf.'}"
        )
    thinker = getattr(config, "thinker_config", None)
    if thinker is not None:
        raise UnsupportedModelError(
            f"{kind!r} joins a thinker, which sees and answers, to a talker. The thinker can be pruned: load it alone "
            f"with {_class_of(thinker.model_type)}.from_pretrained(...), or attach to that part of the whole model: "
            "`pruner(model.thinker)`."
        )


def _class_of(kind: str) -> str:
    """Name of the class that transformers has for a model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names

    return str(names.get(kind, f"the class of {kind!r}"))
