"""What methods cost the host: Python, launches and copies, where arithmetic costs nothing.

    python benchmarks/host.py [--methods fastv:keep=8 dense --rounds 30 --json out.json]

A decoder of 32 layers and width 32 on one thread: nearly all of its time is what a GPU's host does for a decoder of any
width. On a fast GPU a prefill of a 7B model at batch 1 takes as long as this does. All figures are ratios to the bare
decoder, from attachments that take turns with it: the median over rounds of processor times in the same round. "Stage
8 / 1" is what a method adds to a prefill of eight rows over what it adds to one of one row.

"Reads" are values that the host asks an accelerator for (`evengaze.testing.reads`), beyond what the bare decoder asks:
in a prefill of one row, of eight rows of which some are padded, and in a decoding step.

"Finding the pictures" is what a prefill of a LLaVA with one narrow layer takes longer with a pruner attached that drops
nothing: the visual tokens, 576 a picture, and what they show are looked for.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from pathlib import Path
from statistics import median
from time import thread_time

import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import evengaze as eg
from evengaze import methods
from evengaze.compat import cache_argument, cache_of
from evengaze.testing.reads import DeviceReads

METHODS = (
    "dense",
    "fastv:keep=8",
    "random:keep=8",
    "illava:keep=8",
    "himap:keep=8",
    "tokencarve:keep=8",
    "pyramiddrop:keep=0.5",
    "sparsevlm:keep=8",
    "divprune:keep=8",
    "tome:keep=8",
    "uniform:keep=8",
    "pool:keep=8",
)
BATCHES = (1, 8)
SIDE, TEXT, STEPS = 4, 12, 8


class Decoder:
    """The decoder, its prompts, and what is done with them."""

    def __init__(self, layers: int, width: int):
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=64,
            )
        ).eval()
        self.length = SIDE * SIDE + TEXT
        self.states = torch.randn(max(BATCHES), self.length, width)
        self.token = torch.full((max(BATCHES), 1), 3)

    def layout(self, batch):
        return eg.VisualLayout.from_spans([(4, 4 + SIDE * SIDE)] * batch, grid=(SIDE, SIDE))

    def prefill(self, batch, mask=None):
        return cache_of(
            self.model(inputs_embeds=self.states[:batch], attention_mask=mask, use_cache=True, logits_to_keep=1)
        )

    def step(self, batch, cache, number):
        place = self.length + number
        self.model(
            input_ids=self.token[:batch],
            position_ids=torch.full((batch, 1), place),
            attention_mask=torch.ones(batch, place + 1, dtype=torch.long),
            **cache_argument(self.model, cache),
        )


@torch.inference_mode()
def clock(decoder, batch):
    """Seconds of a prefill and of a decoding step: one warm-up, then the best of two and the median of `STEPS`."""
    decoder.prefill(batch)
    prefills = []
    for _ in range(2):
        start = thread_time()
        cache = decoder.prefill(batch)
        prefills.append(thread_time() - start)
    steps = []
    for number in range(STEPS):
        start = thread_time()
        decoder.step(batch, cache, number)
        steps.append(thread_time() - start)
    return min(prefills), median(steps)


def times(decoder, specs, rounds):
    """(prefill, step) of every round, by batch and method; None is the bare decoder."""
    pruners = {None: None, **{spec: methods.parse(spec) for spec in specs}}
    found = {(batch, name): [] for batch in BATCHES for name in pruners}
    names = list(pruners)
    for turn in range(-1, rounds):
        gc.collect()
        gc.disable()
        for batch in BATCHES:
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                handle = None if name is None else pruners[name](decoder.model, layout=decoder.layout(batch))
                try:
                    seconds = clock(decoder, batch)
                finally:
                    if handle is not None:
                        handle.remove()
                if turn >= 0:
                    found[batch, name].append(seconds)
        gc.enable()
    return found


@torch.inference_mode()
def reads(decoder, spec, batch, padded=False):
    """Reads and blocking uploads of a prefill and of a decoding step."""
    mask = None
    if padded:
        mask = torch.ones(batch, decoder.length, dtype=torch.long)
        mask[::2, :2] = 0
    handle = None if spec is None else methods.parse(spec)(decoder.model, layout=decoder.layout(batch))
    try:
        with DeviceReads(decoder.model, decoder.states, decoder.token, mask) as prefill:
            cache = decoder.prefill(batch, mask)
        with DeviceReads(decoder.model, decoder.states, decoder.token, cache_tensors(cache)) as step:
            decoder.step(batch, cache, 0)
    finally:
        if handle is not None:
            handle.remove()
    return {"prefill": prefill.total, "step": step.total, "uploads": sum(prefill.uploads.values())}


@torch.inference_mode()
def finding(batch, pictures, rounds):
    """Milliseconds that it takes to find the pictures of a prompt: the median of differences between neighbours."""
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlavaConfig(
        text_config=LlamaConfig(**tiny, num_key_value_heads=2, vocab_size=64),
        vision_config=CLIPVisionConfig(**tiny, image_size=336, patch_size=14, projection_dim=32),
        image_token_index=60,
        image_seq_length=576,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 50, (batch, 576 * pictures + TEXT))
    ids[:, 4 : 4 + 576 * pictures] = 60
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}
    given["pixel_values"] = torch.randn(batch * pictures, 3, 336, 336)

    def clocked():
        start = thread_time()
        model(**given)
        return (thread_time() - start) * 1e3

    model(**given)
    with eg.Dense()(model):
        model(**given)
    found = []
    for _ in range(rounds):
        bare = clocked()
        with eg.Dense()(model):
            found.append(clocked() - bare)
    return median(found)


def cache_tensors(cache):
    return [[layer.keys, layer.values] for layer in cache.layers]


def ratio(found, name, batch, which):
    pairs = zip(found[batch, name], found[batch, None], strict=True)
    return median(a[which] / b[which] for a, b in pairs)


def stage_ratio(found, name):
    """What a method adds at the larger batch, over what it adds at batch 1; None if it adds next to nothing."""
    small, large = BATCHES
    added = {
        batch: median(a[0] - b[0] for a, b in zip(found[batch, name], found[batch, None], strict=True))
        for batch in BATCHES
    }
    bare = median(b[0] for b in found[small, None])
    return added[large] / added[small] if added[small] > 0.02 * bare else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    decoder = Decoder(options.layers, options.width)
    found = times(decoder, options.methods, options.rounds)
    bare = {batch: [median(t[i] for t in found[batch, None]) * 1e3 for i in (0, 1)] for batch in BATCHES}
    print(
        f"{options.layers} layers of width {options.width}, {SIDE * SIDE} visual + {TEXT} text tokens, one thread, "
        f"{options.rounds} rounds; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}\nbare decoder, ms: "
        + "; ".join(f"batch {b}: prefill {p:.2f}, step {s:.2f}" for b, (p, s) in bare.items())
        + "\n"
    )
    print(f"{'':22}{'prefill / bare':^16}{'step / bare':^16}{'stage':>8}{'reads: prefill':>17}{'step':>6}")
    print(
        f"{'method':22}" + "".join(f"{'batch ' + str(b):>8}" for b in BATCHES * 2) + f"{'8 / 1':>8}{'1   8 padded':>17}"
    )
    base = [reads(decoder, None, 1), reads(decoder, None, 8, padded=True)]
    rows = []
    for spec in options.methods:
        asked = [reads(decoder, spec, 1), reads(decoder, spec, 8, padded=True)]
        row = {
            "method": spec,
            "prefill": {b: ratio(found, spec, b, 0) for b in BATCHES},
            "step": {b: ratio(found, spec, b, 1) for b in BATCHES},
            "stage": stage_ratio(found, spec),
            "reads": {b: a["prefill"] - z["prefill"] for b, a, z in zip(BATCHES, asked, base, strict=True)},
            "step_reads": max(a["step"] - z["step"] for a, z in zip(asked, base, strict=True)),
            "uploads": {b: a["uploads"] - z["uploads"] for b, a, z in zip(BATCHES, asked, base, strict=True)},
        }
        rows.append(row)
        stage = "" if row["stage"] is None else f"{row['stage']:.2f}"
        print(
            f"{spec:22}"
            + "".join(f"{row[what][b]:>8.3f}" for what in ("prefill", "step") for b in BATCHES)
            + f"{stage:>8}{row['reads'][1]:>9}{row['reads'][8]:>8}{row['step_reads']:>6}"
        )
    shapes = {"one picture": (1, 1), "four": (1, 4), "eight rows": (8, 1)}
    front = {name: finding(*shape, options.rounds) for name, shape in shapes.items()}
    print("\nfinding the pictures, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in front.items()))
    if options.json:
        options.json.write_text(json.dumps({"bare_ms": bare, "rows": rows, "finding_ms": front}, indent=1))


if __name__ == "__main__":
    main()
