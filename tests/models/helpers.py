"""Layouts of tiny models, as the engine would ask for them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from evengaze.engine.encoded import Encoded, Features, watch
from evengaze.layout import VisualLayout
from evengaze.models import Call, EncoderCall, adapter_for

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def encode(model: Any, inputs: dict[str, Tensor]) -> tuple[list[EncoderCall], dict[str, Tensor]]:
    """Run the encoders on a model's inputs: the recorded calls, and all features (n, d) by kind."""
    watched, features = Encoded(), {}
    undo = list(watch(model.base_model, lambda: watched, Features()))
    for kind, name in PIXELS.items():
        if name not in inputs:
            continue
        function = getattr(model.base_model, f"get_{kind}_features")
        arguments = {k: inputs[k] for k in inspect.signature(function).parameters if k in inputs}
        with torch.no_grad():
            result = function(**arguments, return_dict=True)
        # Granite 4 Vision has features for several layers and no others; the first stand for all.
        out = result.pooler_output if "pooler_output" in result else result.deepstack_features[0][1]
        parts = out if isinstance(out, (list, tuple)) else list(out)
        features[kind] = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts])
    for restore in undo:
        restore()
    return watched.calls, features


def layout(model: Any, inputs: dict[str, Tensor], *, repeat: int = 1) -> VisualLayout | None:
    """The adapter's layout of a prompt whose rows are repeated for beams."""
    calls, _ = encode(model, inputs)
    ids = inputs["input_ids"].repeat_interleave(repeat, 0)
    mask = inputs["attention_mask"].bool().repeat_interleave(repeat, 0)
    return adapter_for(model).layout(model, Call(ids, mask, 0, calls))
