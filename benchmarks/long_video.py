"""Long video prompts: how the cost of scoring grows, and what pruning saves, on a narrow random Qwen2.5-VL.

    python benchmarks/long_video.py [--methods "fastv:keep=0.1;pyramiddrop" --rounds 9 --threads 1 --json out.json]

Prompts of 4, 8, 16 and 32 frames of 16 x 16 visual tokens (1,024 to 8,192). For each length and method: the processor
time that scoring and choosing take at all stages together (the best of several rounds), and the most memory that they
hold at once. The slope is that of log(time) over log(tokens). HiMAP's second stage reads a row for every visual token
that is left, so it is not linear.

At 32 frames: peak memory and time of the whole prefill, vision tower included, as ratios to the dense prefill of the
same round; then the same for a decoder alone. Weights are random: they influence neither.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch

from evengaze.layout import VisualLayout
from evengaze.methods import Pruner, parse
from evengaze.profile import interleave, peak_bytes
from evengaze.testing import tiny
from evengaze.testing.prompts import END, START, VIDEO

FRAMES = (4, 8, 16, 32)
SIDE = 16
VIDEO_SPAN = (22, 22 + FRAMES[-1] * SIDE**2)


def prompt(frames: int) -> dict[str, torch.Tensor]:
    """A video of `frames` frames between two pieces of text."""
    grid = torch.tensor([[frames, 2 * SIDE, 2 * SIDE]])
    ids = [1, *range(10, 30), START, *[VIDEO] * (frames * SIDE**2), END, *range(30, 60)]
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values_videos": torch.randn(int(grid.prod()), 3 * 2 * 14 * 14),
        "video_grid_thw": grid,
        "mm_token_type_ids": 2 * (input_ids == VIDEO).long(),
    }


def prefill(
    model: Any, inputs: dict[str, torch.Tensor], pruner: Pruner | None = None, layout: VisualLayout | None = None
) -> Any:
    with torch.inference_mode():
        if pruner is None:
            return model(**inputs, use_cache=True, logits_to_keep=1)
        with pruner(model, layout=layout):
            return model(**inputs, use_cache=True, logits_to_keep=1)


@contextmanager
def each_selection(pruner: Pruner, measure: Callable[[Callable[[], Any]], float]) -> Iterator[list[float]]:
    """Measure a method's scoring and choosing at every stage."""
    found: list[float] = []
    select = pruner.select

    def measured(view: Any) -> Any:
        chosen: list[Any] = []
        found.append(measure(lambda: chosen.append(select(view))))
        return chosen[0]

    object.__setattr__(pruner, "select", measured)  # methods are frozen dataclasses
    try:
        yield found
    finally:
        object.__delattr__(pruner, "select")


def processor_time(call: Callable[[], Any]) -> float:
    """Seconds; other programs on the machine do not count."""
    start = process_time()
    call()
    return process_time() - start


def scoring(model: Any, inputs: dict[str, torch.Tensor], pruner: Pruner, rounds: int) -> tuple[float, float]:
    """Processor seconds of all stages together (best round), and the largest peak of a stage."""
    best = math.inf
    for _ in range(rounds):
        with each_selection(pruner, processor_time) as times:
            prefill(model, inputs, pruner)
        best = min(best, sum(times))
    with each_selection(pruner, peak_bytes) as peaks:
        prefill(model, inputs, pruner)
    return best, max(peaks)


def bare_decoder(layers: int, frames: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A decoder alone, of twice the width, with stand-ins for the visual tokens."""
    wide = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 4}
    model, _ = tiny("llama", num_hidden_layers=layers, head_dim=32, **wide)
    return model, {"input_ids": prompt(frames)["input_ids"]}


def compare(
    model: Any, inputs: dict[str, torch.Tensor], layout: VisualLayout | None, specs: list[str], rounds: int
) -> dict[str, dict[str, float]]:
    """Time and peak memory of prefills, as ratios to the dense one of the same round."""
    pruners = {"dense": None, **{spec: parse(spec) for spec in specs}}
    calls = {name: partial(prefill, model, inputs, pruner, layout) for name, pruner in pruners.items()}
    times = interleave(calls, rounds=rounds)
    memory = {name: peak_bytes(call) for name, call in calls.items()}
    print(f"\n{type(model).__name__}, {inputs['input_ids'].shape[1]} tokens".ljust(56) + "time  CPU time  peak memory")
    rows = {}
    for name, timing in times.items():
        rows[name] = {
            "time": timing.ratio(times["dense"]),
            "cpu_time": timing.cpu_ratio(times["dense"]),
            "peak_memory": memory[name] / memory["dense"],
            "peak_bytes": float(memory[name]),
        }
        figures = "".join(f"{rows[name][k]:10.3f}" for k in ("time", "cpu_time", "peak_memory"))
        print(f"{name:50}{figures}   ({memory[name] / 2**20:.0f} MiB)")
    return rows


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log(y) over log(x)."""
    a, b = torch.tensor(x).log(), torch.tensor(y).log()
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a @ a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="fastv:keep=0.1;pyramiddrop;himap:keep=0.1")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, _ = tiny("qwen2_5_vl", num_hidden_layers=options.layers)
    prompts = {frames: prompt(frames) for frames in FRAMES}
    tokens = [float(f * SIDE**2) for f in FRAMES]
    report: dict[str, Any] = {"tokens": tokens, "methods": {}}
    print("method".ljust(24) + "".join(f"{n:>14.0f}" for n in tokens) + "   slope")
    specs = [s.strip() for s in options.methods.split(";")]
    for spec in specs:
        pruner = parse(spec)
        found = [scoring(model, prompts[f], pruner, options.rounds) for f in FRAMES]
        times, peaks = [t for t, _ in found], [float(p) for _, p in found]
        entry = {"seconds": times, "slope": slope(tokens, times), "bytes": peaks, "bytes_slope": slope(tokens, peaks)}
        report["methods"][spec] = entry
        print(f"{spec:24}" + "".join(f"{1e3 * t:11.2f} ms" for t in times) + f"{entry['slope']:8.2f}")
        print(f"{'':24}" + "".join(f"{p / 2**20:10.2f} MiB" for p in peaks) + f"{entry['bytes_slope']:8.2f}")

    decoder, ids = bare_decoder(options.layers, FRAMES[-1])
    layout = VisualLayout.from_spans([VIDEO_SPAN], (SIDE, SIDE))
    report["prefill"] = {
        "whole model": compare(model, prompts[FRAMES[-1]], None, specs, options.rounds),
        "decoder of width 128": compare(decoder, ids, layout, specs, options.rounds),
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
