"""A model from its config alone, with random weights: they influence neither time nor memory."""

from __future__ import annotations

from typing import Any

import torch

from evengaze.errors import ConfigError
from evengaze.models.inspect import skeleton_model
from evengaze.models.registry import adapter_for
from evengaze.profile.memory import free_bytes

_SPREAD = 0.02
"""Standard deviation of the weights: what most families start training with."""


def random_model(
    config: Any, *, dtype: torch.dtype, device: torch.device | str = "cpu", attention: str | None = None
) -> Any:
    """A model with random weights, made on the device where it will run.

    Args:
        config: transformers config.
        dtype: of the weights.
        device: where.
        attention: attention implementation; None is transformers' default.

    Raises:
        UnsupportedModelError: there is no such model, or it cannot be pruned.
        ConfigError: it does not fit, or has no such attention implementation.
    """
    from transformers.initialization import no_init_weights

    device = torch.device(device)
    skeleton = skeleton_model(config)
    adapter_for(skeleton)
    _check_room(skeleton, dtype, device)
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with no_init_weights(), torch.device(device):
            model = type(skeleton)._from_config(config, dtype=dtype, **options)
    except (ValueError, ImportError) as error:
        if attention is None:
            raise
        raise ConfigError(f"attention {attention!r} cannot be used: {' '.join(str(error).split())[:300]}") from None
    _fill(model)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, settings.pad_token_id or 0
    return model.eval()


@torch.no_grad()
def _fill(model: Any) -> None:
    """Small numbers everywhere; norms multiply by about one."""
    for name, p in model.named_parameters():
        if p.is_floating_point():
            p.normal_(1.0 if p.dim() == 1 and "norm" in name and name.endswith("weight") else 0.0, _SPREAD)


def _check_room(skeleton: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Raise a ConfigError if the weights alone do not fit."""
    need = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    free = free_bytes(device)
    if free is not None and need > free:
        raise ConfigError(
            f"the weights need {need / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, but {device} has "
            f"{free / 1e9:.1f} GB free. Use a smaller dtype or model, or another device"
        )
