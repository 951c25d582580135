"""Which model, how it is loaded, and where it runs: what every command and every worker is given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evengaze.errors import ConfigError, DataError, LayoutError
from evengaze.evaluate.conversation import Style
from evengaze.extras import require
from evengaze.models.loading import load_adapter, load_model, load_processor, quantization
from evengaze.parameters import coerce

DEMO = "demo"
"""Name of the embedded model."""
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelSpec:
    """What to load; picklable, so that every worker loads the same.

    Attributes:
        source: hub id, local folder, or "demo" for the embedded model.
        revision: commit, branch or tag on the hub.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto" (an accelerator if there is one, this process's own under torchrun), "cpu", "cuda:1", ..., or
            "balanced" to spread the layers over all GPUs (needs accelerate).
        attention: attention implementation; None is transformers' default.
        prompt: see `evengaze.evaluate.conversation`; "official" also converts pictures as LLaVA's scripts do.
        allow_missing: load a checkpoint that lacks weights all the same, with random numbers in their place.
        adapter: a LoRA (or another adapter of peft's) on top of the model: local folder or hub id.
        quantize: quantise the weights while they are loaded: "8bit" or "4bit"; None leaves them as they are.
    """

    source: str = ""
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str | None = None
    prompt: Style = "auto"
    allow_missing: bool = False
    adapter: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        coerce(self, "model")

    @property
    def official(self) -> bool:
        """Whether everything up to the model is to be as in LLaVA's scripts: prompts, and how pictures become RGB."""
        return self.prompt == "official"

    @property
    def name(self) -> str:
        """`model_id` of answer records: the last part of the path, with its parent for `checkpoint-N`."""
        parts = [part for part in self.source.replace(os.sep, "/").split("/") if part]
        if parts[-1].startswith("checkpoint-") and len(parts) > 1:
            return f"{parts[-2]}_{parts[-1]}"
        return parts[-1]


def open_spec(spec: ModelSpec) -> tuple[Any, Any, tuple[str, ...]]:
    """Load what a spec names.

    Returns:
        The model on its device, its processor, and the names of weights that are random as the checkpoint lacks them.

    Raises:
        DataError: there is no such model, its files are broken or pickles, it lacks weights, or it needs code of
            its own.
        ConfigError: the device or dtype does not exist.
        MissingExtraError: a package is not installed that the device, the adapter or quantising needs.
    """
    dtype, device = dtype_of(spec.dtype), device_of(spec.device)  # before anything slow
    if spec.source == DEMO:
        from evengaze import demo

        _only_from_a_checkpoint(quantize=spec.quantize)
        model, processor = demo.load(torch.float32 if dtype == "auto" else dtype)
        model = _with_attention(model, spec.attention)
        if spec.adapter is not None:
            load_adapter(model, spec.adapter)
        return model.to(device), processor, ()
    name = f"model {spec.source}"
    check_source(spec.source, name)
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {"dtype": dtype}
    if spec.attention is not None:
        options["attn_implementation"] = spec.attention
    if spec.device == "balanced":
        require("accelerate", "device 'balanced'", "accelerate")
        options["device_map"] = "balanced"
    if spec.quantize is not None:
        options["quantization_config"] = quantization(spec.quantize)
        options.setdefault("device_map", {"": device})  # quantised weights stay where they were loaded
    processor = load_processor(spec.source, revision=spec.revision, name=name)
    model, missing = load_model(
        AutoModelForImageTextToText,
        spec.source,
        revision=spec.revision,
        name=name,
        allow_missing=spec.allow_missing,
        **options,
    )
    if model.config.model_type == "llava":
        processor = _square(processor)
    if spec.adapter is not None:
        load_adapter(model, spec.adapter)
    return model if "device_map" in options else model.to(device), processor, tuple(missing)


def check_source(source: str, name: str, more: str = "") -> None:
    """Find out whether a source can be one.

    Args:
        source: see `ModelSpec.source`.
        name: what the message calls it.
        more: what else it could have been.

    Raises:
        DataError: it is no folder, no hub id, and not the embedded model.
    """
    if source != DEMO and "/" not in source and not Path(source).exists():
        raise DataError(
            f"{name}: there is no such folder here, and hub ids look like llava-hf/llava-1.5-7b-hf; '{DEMO}' is the "
            f"embedded model{more}"
        )


def _square(processor: Any) -> Any:
    from evengaze.models import llava_processor

    try:
        return llava_processor(processor)
    except LayoutError:  # a Pixtral or SigLIP processor of its own kind: it pads as its model was trained
        return processor


def _only_from_a_checkpoint(**given: Any) -> None:
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ConfigError(f"{', '.join(named)}: the embedded model is no checkpoint that this can be done to")


def _with_attention(model: Any, name: str | None) -> Any:
    """The embedded model with another attention implementation."""
    if name is not None:
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"attention {name!r} cannot be used: {' '.join(str(error).split())[:300]}") from None
    return model


def dtype_of(name: str) -> Any:
    """The torch dtype of `ModelSpec.dtype`; "auto" stays.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "auto":
        return "auto"
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} does not exist; use auto, {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
    return getattr(torch, name)


def device_of(name: str) -> torch.device:
    """The device of `ModelSpec.device`; of "balanced" the first.

    Raises:
        ConfigError: there is none of that name here.
    """
    if name in ("auto", "balanced"):
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        probe = torch.ones(1, device=name)
        probe.item()  # "meta" has tensors, but no numbers in them
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); use auto, cpu, cuda, cuda:N or mps") from None
    return probe.device
