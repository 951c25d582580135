"""Make a small folder of recorded cases from a large one: `python tests/parity/subset.py --data DIR --out DIR CASE...`.

With `--layers N` the model keeps its first N layers only, and cases lose what later layers, and so the logits, gave.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

_BY_LAYER = {"prefill_n_in", "prefill_pos_last", "prefill_kv_len", "prefill_hidden_last_per_layer"}
_BY_STEP_AND_LAYER = {"decode_pos", "decode_kv_len"}
_FROM_THE_LAST_LAYER = re.compile(
    r"(prefill|decode)_logits.*|prefill_hidden_last_(prenorm|norm)|avg_tokens_official|flops_official"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    index = json.loads((options.data / "cases.json").read_text())
    index["cases"] = [c for c in index["cases"] if c.get("case", c.get("name")) in options.cases]
    for case in index["cases"]:
        arrays = _load(options.data / case["file"])
        _save(options.out / case["file"], _cut(case, arrays, options.layers) if options.layers else arrays)
        case.pop("arrays", None)
    if "masks" in index:
        _save(options.out / index["masks"]["file"], _load(options.data / index["masks"]["file"]))
    _copy_models(index, options.data, options.out, options.layers)
    _copy_inputs(index, options.data, options.out)
    (options.out / "weights.json").write_bytes((options.data / "weights.json").read_bytes())
    (options.out / "cases.json").write_text(json.dumps(index, indent=1) + "\n")
    return 0


def _cut(case: dict[str, Any], arrays: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Without what the layers from `layers` on computed; the case's stages are shortened likewise."""
    stages = 99
    if "layer_list" in case:
        case["layer_list"] = [layer for layer in case["layer_list"] if layer < layers]
        stages = len(case["layer_list"])
        case["image_token_ratio_list"] = case["image_token_ratio_list"][:stages]
    if "stages" in case:
        case["stages"] = [s for s in case["stages"] if s["layer"] + 1 < layers]
        stages = len(case["stages"])
    kept = {}
    for name, value in arrays.items():
        stage, layer = re.match(r"s(\d+)_", name), re.match(r"(?:prefill_pos_)?layer(\d+)", name)
        if _FROM_THE_LAST_LAYER.fullmatch(name) or (stage and int(stage[1]) >= stages):
            continue
        if layer and int(layer[1]) >= layers:
            continue
        if name in _BY_LAYER:
            value = value[:layers]
        elif name in _BY_STEP_AND_LAYER:
            value = value[:, :layers]
        kept[name] = value
    return kept


def _copy_models(index: dict[str, Any], source: Path, out: Path, layers: int | None) -> None:
    for path in sorted(source.glob("*.safetensors")):
        weights = load_file(path)
        if layers:
            weights = {k: v for k, v in weights.items() if not _beyond(k, layers)}
        if "siglip" in path.name:  # the cases start behind the embeddings
            weights = {k: v for k, v in weights.items() if "layers." in k}
        save_file(weights, out / path.name)
    for path in [source / name for name in ("config.json", "tiny_llama_config.json")]:
        if path.exists():
            config = json.loads(path.read_text())
            (out / path.name).write_text(
                json.dumps({**config, "num_hidden_layers": layers or config["num_hidden_layers"]}, indent=1) + "\n"
            )


def _beyond(name: str, layers: int) -> bool:
    found = re.search(r"layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= layers


def _copy_inputs(index: dict[str, Any], source: Path, out: Path) -> None:
    cases = [c for c in index["cases"] if "input" in c]
    if "inputs" in index:
        names = {c["input"] for c in cases}
        _save(out / "inputs.npz", {k: v for k, v in _load(source / "inputs.npz").items() if k in names})
        return
    for file in {c["input"]["file"] for c in cases}:
        seeds = {c["input"]["seed"] for c in cases if c["input"]["file"] == file}
        arrays = {k: v for k, v in _load(source / file).items() if int(k.rsplit("_s", 1)[1]) in seeds}
        _save(out / file, arrays)


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        return dict(data)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    sys.exit(main())
