"""Cases of iLLaVA's stage inside a SigLIP tower."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from evengaze.methods._tower import TowerCut
from evengaze.methods.illava import ILLaVA
from evengaze.models.base import VisionTower
from evengaze.protocol import Selection
from parity.record import Folder, Report


def check_tower(folder: Folder, case: dict[str, Any], report: Report) -> None:
    """Run the encoder from the first merging layer on; recorded states stand in for the layers before it."""
    p = case["params"]
    layers = encoder(folder, p["config"])
    method = ILLaVA(vision_layers=tuple(p["illava_vit_k"]), vision_drop=p["illava_vit_r"], mode="official")
    log: list[tuple[Tensor, Selection]] = []

    def choose(score: Tensor) -> Selection:
        selection = method.recycle_patches(score)
        log.append((score, selection))
        return selection

    cut = TowerCut(VisionTower(layers, layers, 0, len(layers)), method.vision_layers, choose)
    undo = cut.install()
    hidden = report.want("hidden_prev")
    with torch.inference_mode():
        for layer in layers[min(method.vision_layers) :]:
            out = layer(hidden, attention_mask=None)
            hidden = out[0] if isinstance(out, tuple) else out
    for step in undo:
        step()

    official = "official" in case["name"]  # rounds merged tokens through float16
    report.close("hidden_out", hidden, atol=1e-2 if official else 1e-4)
    report.close(
        "score", torch.cat([row for score, _ in log for row in score]), atol=1e-8, rtol=2e-3 if official else 1e-4
    )
    lowest = torch.stack([row.flip(0) for _, s in log if s.merge is not None for row in s.merge.source])
    report.equal("lowest", lowest)
    report.equal("kept_original", cut.kept)
    report.waive("pixel_values")


def encoder(folder: Folder, config: dict[str, Any]) -> nn.ModuleList:
    """The tower's layers with the recorded weights, whatever prefix these have."""
    model = SiglipVisionModel._from_config(SiglipVisionConfig(**config, image_size=112), attn_implementation="eager")
    layers: nn.ModuleList = getattr(model, "vision_model", model).encoder.layers
    names = set(layers.state_dict())
    file = next(f for f in folder.index["shared_files"] if "siglip" in f)
    weights = {}
    for name, value in load_file(folder.path / file).items():
        tail = name.split("layers.", 1)[-1]
        if tail in names:
            weights[tail] = value
    layers.load_state_dict(weights)
    return layers.eval()
