"""Loads the embedded model and its processor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from safetensors.torch import load as load_safetensors

from evengaze.errors import ConfigError, DataError
from evengaze.files import read_bytes, read_json, read_text

FOLDER = Path(__file__).parent / "weights"
SCALE = ".scale"
_INCOMPLETE = "The embedded model is incomplete: reinstall evengaze."

_FASTER = 0.7
"""Share of float32's time that bfloat16 may take to be worth its rounding."""


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load the embedded vision-language model; no network.

    A fraction of a second, and once a process two more in which transformers imports LLaVA's model code.

    Args:
        dtype: of the model's parameters; the file holds 8-bit integers.

    Returns:
        The model, a `LlavaForConditionalGeneration` in evaluation mode, and its processor, a `LlavaProcessor`.

    Raises:
        DataError: the weights are missing or are not the ones that belong to this release.
    """
    model = load_model(FOLDER, dtype)
    model.config._name_or_path = "demo"  # what curves and reports call it
    return model, load_processor(FOLDER)


def fastest_dtype() -> torch.dtype:
    """float32, or bfloat16 where this machine multiplies matrices of the model's sizes clearly faster in it."""
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(20):  # short and in turns: on a busy machine, too, some of each are not interrupted
        for dtype, best in seconds.items():
            states, weight = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
            start = perf_counter()
            torch.nn.functional.linear(states, weight)
            seconds[dtype] = min(best, perf_counter() - start)
    return torch.bfloat16 if seconds[torch.bfloat16] < _FASTER * seconds[torch.float32] else torch.float32


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of a name, "float32" or "bfloat16"; "auto" is the fastest of them.

    Raises:
        ConfigError: another name.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in (*known, "auto"):
        raise ConfigError(f"dtype must be auto, {' or '.join(known)}, not {name!r}")
    return known[name] if name in known else fastest_dtype()


def dtype_of(model: Any) -> str:
    """Name of what a model computes in."""
    return str(model.dtype).removeprefix("torch.")


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model from a folder with `config.json`, `model.safetensors` and `model.safetensors.sha256`.

    Raises:
        DataError: a file is missing or damaged, or the weights do not have the recorded SHA-256.
    """
    folder = Path(folder)
    raw = read_bytes(folder / "model.safetensors", _INCOMPLETE)
    expected = read_text(folder / "model.safetensors.sha256", _INCOMPLETE).partition(" ")[0].strip()
    config = transformers.LlavaConfig(**read_json(folder / "config.json", dict, _INCOMPLETE))
    found = hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise DataError(
            f"{folder / 'model.safetensors'} is damaged or not the file of this release: its SHA-256 is {found}, "
            f"expected {expected}; reinstall evengaze"
        )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    weights = dequantise(load_safetensors(raw), dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise DataError(f"the weights do not fit the model: missing {missing}, unexpected {unexpected}")
    _restore_buffers(model)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        do_sample=False,
        max_new_tokens=8,
    )
    return model.eval()


def load_processor(folder: str | Path) -> Any:
    """Load the processor of a folder with its two configuration files and the tokenizer's.

    The image processor is the one that needs no torchvision.

    Raises:
        DataError: a configuration file is missing or damaged.
    """
    folder = Path(folder)
    settings = read_json(folder / "preprocessor_config.json", dict, _INCOMPLETE)
    # Releases before the PIL backend call the same image processor by the plain name.
    image_processor = getattr(transformers, "LlavaImageProcessorPil", None) or transformers.LlavaImageProcessor
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    more = read_json(folder / "processor_config.json", dict, _INCOMPLETE)
    return transformers.LlavaProcessor(image_processor=image_processor(**settings), tokenizer=tokenizer, **more)


def quantise(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices as 8-bit integers with one float16 scale a row (named `<name>.scale`), everything else as float16."""
    stored: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if value.ndim < 2:
            stored[name] = value.half()
            continue
        rows = value.float().flatten(1)
        scale = (rows.abs().amax(1).clamp(min=1e-7) / 127).half()
        integers = (rows / scale.float()[:, None]).round().clamp(-127, 127)
        stored[name] = integers.to(torch.int8).view(value.shape)
        stored[name + SCALE] = scale
    return stored


def dequantise(stored: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Undo `quantise`."""
    weights = {}
    for name, value in stored.items():
        if name.endswith(SCALE):
            continue
        scale = stored.get(name + SCALE)
        if scale is not None:
            value = value.float() * scale.float().view(-1, *[1] * (value.ndim - 1))
        weights[name] = value.to(dtype)
    return weights


def _restore_buffers(model: Any) -> None:
    """Compute the buffers that no file holds, because the model was made without memory of its own."""
    vision = model.model.vision_tower
    embeddings = getattr(vision, "vision_model", vision).embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions).expand((1, -1))
    text = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config=text.config)
