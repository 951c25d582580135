"""What a report of a fault should say: versions, devices, attention implementations, and whether pruning works here."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "pillow")
"""What pruning needs."""

OPTIONAL = ("accelerate", "peft", "bitsandbytes", "flash-attn", "matplotlib", "typer", "rich", "jinja2", "av", "ray")
"""What some commands and models need on top."""

_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def describe(*, check: bool = True) -> dict[str, Any]:
    """The environment as JSON-able values; loads no model.

    Args:
        check: prune a tiny decoder by every kind of stage (`evengaze.engine.selfcheck`), which takes a moment.

    Returns:
        `evengaze`, `python`, `platform`, `packages` and `optional` (versions, None where one is not installed),
        `devices`, `attention` (implementations that can be asked for here), `variables` that are set, and
        `self_check` with `passed`, and `difference` and `seconds` or the `error`.
    """
    from evengaze.version import __version__

    found: dict[str, Any] = {
        "evengaze": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: _version(name) for name in OPTIONAL},
        "devices": devices(),
        "attention": attention(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    if check:
        found["self_check"] = self_check()
    return found


def devices() -> dict[str, Any]:
    """Processors and accelerators that torch sees, and the CUDA and cuDNN that it was built with."""
    import torch

    cuda = [
        {"name": one.name, "memory_gib": round(one.total_memory / 2**30, 1), "capability": f"{one.major}.{one.minor}"}
        for one in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "cuda": cuda,
        "cuda_version": torch.version.cuda,
        "mps": bool(torch.backends.mps.is_available()),
    }


def attention() -> list[str]:
    """Attention implementations of transformers that can be used here, under every one of which tokens are removed."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    found = ["eager", "sdpa"]
    if is_flash_attn_2_available():
        found.append("flash_attention_2")
    if is_torch_flex_attn_available():
        found.append("flex_attention")
    return found


def self_check() -> dict[str, Any]:
    """Whether pruning works with the installed transformers; see `evengaze.engine.selfcheck.check`."""
    from evengaze.engine import selfcheck
    from evengaze.errors import IncompatibleReleaseError

    start = perf_counter()
    try:
        worst = selfcheck.check()
    except IncompatibleReleaseError as error:
        return {"passed": False, "error": str(error)}
    return {"passed": True, "difference": worst, "seconds": round(perf_counter() - start, 3)}


def as_lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `describe` found as pairs of a name and a text."""
    known = found["devices"]
    cpu = known["cpu"]
    gpus = [f"{one['name']}, {one['memory_gib']} GiB, compute {one['capability']}" for one in known["cuda"]]
    gpus += ["Apple MPS"] if known["mps"] else []
    lines = [
        ("evengaze", found["evengaze"]),
        ("python", f"{found['python']} on {found['platform']}"),
        *((name, value or "not installed") for name, value in found["packages"].items()),
        ("optional", ", ".join(f"{name} {value}" for name, value in found["optional"].items() if value) or "none"),
        ("not installed", ", ".join(name for name, value in found["optional"].items() if not value) or "nothing"),
        ("processor", f"{cpu['machine']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads"),
        ("accelerators", "; ".join(gpus) or "none"),
        ("CUDA", known["cuda_version"] or "torch was built without"),
        ("attention", ", ".join(found["attention"])),
        ("variables", ", ".join(f"{k}={v}" for k, v in found["variables"].items()) or "none of interest"),
    ]
    if "self_check" in found:
        result = found["self_check"]
        said = (
            f"passed, off by {result['difference']:.1g} at most, {result['seconds']:.2f} s"
            if result["passed"]
            else f"FAILED: {result['error']}"
        )
        lines.append(("self-check", said))
    return lines


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
