"""What pruning does on a GPU: whole prefills with the tower, graphs, synchronisations, decoding: one command.

    python benchmarks/gpu.py [--part prefill graphs syncs compiled decode gaps] [--methods fastv dense] [--out out.json]

A model of LLaVA-1.5-7B's shape with random weights in bfloat16, made on the device; prompts of 60 text tokens with one
picture (576 tokens) in one row, in eight rows, and with four pictures (2,304 tokens) in one row. Times are ratios to
the model without a pruner in the same rounds (medians); with graphs also to that eager model. `--tiny` is a small model
on whatever device there is: it shows that the benchmark runs, its times mean nothing. On a CPU a stand-in that runs the
captured function again takes the place of CUDA graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import evengaze as eg
from evengaze import methods
from evengaze.compat import cache_argument, cache_of
from evengaze.debias import Exponential
from evengaze.engine import graphs as captured

PARTS = ("prefill", "graphs", "syncs", "compiled", "decode", "gaps")
NAMES = ("dense", "fastv", "pyramiddrop", "sparsevlm", "himap", "tokencarve", "illava", "divprune", "visionzip", "tome")
SHAPES = {"b1": (1, 1), "b8": (8, 1), "4 pictures": (1, 4)}
IMAGE, TEXT, FRONT = 1000, 60, 20
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
START = time.time()


def say(*words):
    print(f"[{time.time() - START:6.1f}s]", *words, flush=True)


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


class Again:
    """Stands in for a captured graph where there is none: runs the function again, on copies of the inputs."""

    def __init__(self, function, inputs, pool):
        self.inputs, self.function = {name: tensor.clone() for name, tensor in inputs.items()}, function

    def __call__(self, inputs):
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        return self.function(self.inputs)

    @staticmethod
    def pool():
        return None


class Bench:
    """The model, its prompts and the methods."""

    def __init__(self, options, layers=None, width=None):
        self.tiny, self.dtype = options.tiny, torch.bfloat16 if CUDA and width is None else torch.float32
        tiny = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        text = {**tiny, "num_key_value_heads": 2, "num_hidden_layers": 32, "vocab_size": 1100}
        tower = {**tiny, "num_hidden_layers": 3}
        self.side = 56 if options.tiny else 336
        if not options.tiny:
            heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": layers or 32}
            text = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32064, **heads}
            tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
            if width:
                text |= {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 4}
                text["num_key_value_heads"] = 4
        elif layers:
            text["num_hidden_layers"] = layers
        self.tokens = (self.side // 14) ** 2
        config = LlavaConfig(
            text_config=LlamaConfig(**text, max_position_embeddings=4096),
            vision_config=CLIPVisionConfig(**tower, image_size=self.side, patch_size=14, projection_dim=64),
            image_token_index=IMAGE,
            image_seq_length=self.tokens,
        )
        torch.manual_seed(0)
        with torch.device(DEVICE):
            kind = LlavaForConditionalGeneration
            self.model = kind._from_config(config, dtype=self.dtype, attn_implementation="sdpa").eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def inputs(self, batch, pictures=1, seed=1, text=TEXT, padded=False):
        chance = torch.Generator().manual_seed(seed)
        visual = pictures * self.tokens
        ids = torch.randint(5, 900, (batch, text + visual), generator=chance)
        ids[:, FRONT : FRONT + visual] = IMAGE
        mask = torch.ones_like(ids)
        if padded:
            mask[::2, :7] = 0
        pixels = torch.randn(batch * pictures, 3, self.side, self.side, generator=chance).to(DEVICE, self.dtype)
        return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE), "pixel_values": pixels}

    def pruner(self, name):
        if name == "fastv+debias":
            debias = eg.Debias(padding=eg.PaddingMask(), trend=Exponential(2.0))
            return self.pruner("fastv").replace(debias=debias)
        fixed = {"fastv": 128, "illava": 128, "divprune": 128, "visionzip": 128, "tome": 128, "sparsevlm": 128}
        if self.tiny:
            fixed = {**dict.fromkeys(fixed, 6), "tokencarve": 6, "himap": "[8,6]"}
        pruner = methods.parse(f"{name}:keep={fixed[name]}" if name in fixed else name)
        depth = self.model.config.text_config.num_hidden_layers
        return pruner if depth == 32 or not hasattr(pruner, "layers") else pruner.replace(layers=None)

    def prefill(self, inputs):
        return self.model(**inputs, use_cache=True, logits_to_keep=1)

    def once(self, inputs):
        """A prefill to time: a function of the handle, which it does not need."""
        return lambda handle: self.prefill(inputs) and None

    def steps(self, inputs, out, count):
        cache, length = cache_of(out), inputs["input_ids"].shape[1]
        batch = len(inputs["input_ids"])
        token = torch.full((batch, 1), 7, device=DEVICE)
        places = torch.arange(length, length + count, device=DEVICE).expand(batch, -1)
        given = cache_argument(self.model, cache)
        for number in range(count):
            self.model(input_ids=token, position_ids=places[:, number : number + 1], **given, use_cache=True)


def attached(bench, name, **options):
    """`name` attached to the model; None leaves it as it is."""
    return nullcontext() if name is None else bench.pruner(name)(bench.model, **options)


def turns(calls, rounds, warmup=2):
    """Milliseconds by name: medians over rounds in which all take their turn. A call is (context, function)."""
    found = {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        for name in list(calls):
            enter, function = calls[name]
            try:
                with enter() as handle:
                    taken = timed(lambda h=handle, f=function: f(h))
            except Exception as error:
                say(f"FAILED {name}: {short(error)}")
                calls.pop(name), found.pop(name)
                continue
            if turn >= 0:
                found[name].append(taken)
    least = {name: f"{min(values):.2f}" for name, values in found.items()}
    say("shortest, ms:", ", ".join(f"{name or 'bare'} {ms}" for name, ms in least.items()))
    return {name: median(values) for name, values in found.items()}


def timed(function):
    synchronize()
    start = time.perf_counter()
    special = function()
    synchronize()
    return special if isinstance(special, float) else (time.perf_counter() - start) * 1e3


def short(error):
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    return f"{type(error).__name__}: {lines[0][:200]} ({where})"


@torch.inference_mode()
def prefill(bench, names, options):
    """Whole prefills by shape, over the bare model's."""
    rows = {}
    for shape, (batch, pictures) in SHAPES.items():
        inputs = bench.inputs(batch, pictures)
        calls = {None: (nullcontext, bench.once(inputs))}
        if shape != "b1":  # how fast the host is in these rounds
            calls["(bare b1)"] = (nullcontext, bench.once(bench.inputs(1)))
        for name in names:
            calls[name] = (partial(attached, bench, name), bench.once(inputs))
        took = turns(calls, options.rounds)
        say(f"prefill {shape}: bare {took[None]:.2f} ms;", ratios(took, took[None]))
        rows[shape] = {"bare ms": took.pop(None), "ms": took}
    return rows


def ratios(took, base):
    return ", ".join(f"{name} {ms / base:.3f}" for name, ms in took.items() if name is not None)


@torch.inference_mode()
def graphs(bench, names, options):
    """Prefills with graphs over the bare eager model's, in turns, and whether they are the engine's bit for bit."""
    rows = {}
    for shape, (batch, pictures) in SHAPES.items():
        one, other = (bench.inputs(batch, pictures, seed=seed) for seed in (1, 5))
        held, equal = eg.Graphs(), {}
        calls = {None: (nullcontext, bench.once(one))}
        for name in names if shape != "b8" else [n for n in names if n in ("dense", "fastv", "pyramiddrop")]:
            try:
                with attached(bench, name):
                    plain = [snapshot(bench, x) for x in (one, other, one)]
                with attached(bench, name, graphs=held):
                    for _ in range(3):
                        bench.prefill(one)
                    found = [snapshot(bench, x) for x in (one, other)]
                equal[name] = {"graphs": alike(found, plain[:2]), "engine itself": alike(plain[2:], plain[:1])}
                calls[name] = (partial(attached, bench, name, graphs=held), bench.once(one))
                del plain, found
            except Exception as error:
                say(f"FAILED graphs {shape} {name}: {short(error)}")
            free()
        captured = held.counts["captured"]
        took = turns(calls, options.rounds)
        again = held.counts["captured"] - captured  # more than 0: memory was too little for all methods' graphs
        rows[shape] = {"bare ms": took.pop(None), "ms": took, "equal": equal, "captured again": again}
        say(f"graphs {shape}: bare {rows[shape]['bare ms']:.2f} ms;", ratios(took, rows[shape]["bare ms"]), held)
        say(f"graphs {shape}: equal", equal)
        held.clear()
        free()
    return rows


def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def snapshot(bench, inputs):
    out = bench.prefill(inputs)
    return [out.logits.clone(), *(t.clone() for x in cache_of(out).layers for t in (x.keys, x.values))]


def alike(found, expected):
    """ "yes", or how far two lists of results are from each other."""
    far = 0.0
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            if x.shape != y.shape:
                return f"shapes {tuple(x.shape)} {tuple(y.shape)}"
            if not torch.equal(x, y):
                far = max(far, float((x.float() - y.float()).abs().max()))
    return "yes" if far == 0 else f"{far:.2g}"


@contextmanager
def watched():
    """Synchronisations that CUDA warns of, by the line that asked: the innermost of ours, and the innermost of all."""
    found, show = Counter(), warnings.showwarning

    def note(message, category, filename, lineno, file=None, line=None):
        if "synchroniz" not in str(message):
            return
        stack = traceback.extract_stack()
        inner = [f for f in stack if "evengaze" in f.filename and "gpu.py" not in f.filename][-1:]
        found[
            " < ".join(
                f"{Path(f[0]).name}:{f[1]}" for f in [(filename, lineno), *((f.filename, f.lineno) for f in inner)]
            )
        ] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = show


@torch.inference_mode()
def syncs(bench, names, options):
    """Synchronisations of prefills and of four decoding steps, beyond the bare model's."""
    rows, base = {}, {}
    for with_graphs in (False, True):
        for name in [None, *names] if not with_graphs else names[:3]:
            key = f"{name}{' graphs' if with_graphs else ''}"
            try:
                with attached(bench, name, **({"graphs": True} if with_graphs else {})):
                    row = rows[key] = {}
                    for kind, batch, padded in (("b1", 1, False), ("b8 padded", 8, True)):
                        inputs = bench.inputs(batch, padded=padded)
                        for _ in range(3 if with_graphs else 1):
                            bench.steps(inputs, bench.prefill(inputs), 1)
                        with watched() as asked:
                            out = bench.prefill(inputs)
                        with watched() as stepped:
                            bench.steps(inputs, out, 4)
                        if name is None:
                            base[kind] = asked
                        row[kind] = asked.total() - base[kind].total(), stepped.total()
                        if name is None or asked.total() - base[kind].total() > 2 or stepped:
                            said = (asked if name is None else asked - base[kind]) + stepped
                            say(f"syncs {key} {kind}: {row[kind]}", dict(said.most_common(8)))
                say(f"syncs {key}: {row}")
            except Exception as error:
                say(f"FAILED syncs {key}: {short(error)}")
            free()
    return rows


@torch.inference_mode()
def decode(bench, names, options):
    """Milliseconds a decoding step, eager."""
    inputs, count = bench.inputs(1), 8

    def step(handle):
        out = bench.prefill(inputs)
        synchronize()
        start = time.perf_counter()
        bench.steps(inputs, out, count)
        synchronize()
        return (time.perf_counter() - start) * 1e3 / count

    calls = {name: (partial(attached, bench, name), step) for name in [None, *names]}
    took = turns(calls, min(4, options.rounds), warmup=1)
    say(f"decode: bare {took[None]:.2f} ms a step;", ratios(took, took[None]))
    return {"bare ms": took.pop(None), "ms": took}


@torch.no_grad()
def compiled(bench, names, options):
    """Compiled decoding on a static cache, eight layers: graphs, equal answers, milliseconds a step.

    Answers are compared in float32 on a narrow model: in bfloat16 the best two words of random weights change places by
    rounding alone. Times are those of the wide one.
    """
    narrow, wide, rows = Bench(options, layers=8, width=256), Bench(options, layers=8), {}
    brief, long = (2, 6) if options.tiny else (8, 72)
    given = {"do_sample": False}
    if not CUDA:
        given["compile_config"] = transformers.CompileConfig(backend="eager", mode=None)
        given["compile_config"]._compile_all_devices = True

    def answer(model, inputs, new, **more):
        return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, **more)

    for name in [None, *(n for n in names if n in ("fastv", "sparsevlm", "pyramiddrop"))]:
        if time.time() - START > options.seconds:
            say(f"no time left for compiled {name}")
            continue
        try:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            equal, start, static = [], time.perf_counter(), {**given, "cache_implementation": "static"}
            for seed, (text, new) in enumerate([(60, 8), (60, 12), (72, 9), (91, 14), (61, 8)]):
                inputs = narrow.inputs(1, seed=seed, text=text)
                with attached(narrow, name):
                    found = answer(narrow.model, inputs, new, **static)
                    expected = answer(narrow.model, inputs, new, do_sample=False)
                equal.append(torch.equal(found, expected))
            made = dict(torch._dynamo.utils.counters["stats"]), list(torch._dynamo.utils.counters["graph_break"])
            taken, inputs, times = time.perf_counter() - start, wide.inputs(1), []
            for _ in range(6):
                with attached(wide, name):
                    some, many = (timed(partial(answer, wide.model, inputs, n, **static)) for n in (brief, long))
                times.append((many - some) / (long - brief))
            row = {
                "graphs": made[0].get("unique_graphs"),
                "equal": equal,
                "ms": median(times[1:]),
                "least": min(times[1:]),
            }
            rows[str(name)] = row
            say(f"compiled {name}: {row}, breaks {made[1]}; the first requests took {taken:.1f} s")
        except Exception as error:
            say(f"FAILED compiled {name}: {short(error)}")
    return rows


@torch.inference_mode()
def gaps(bench, names, options):
    """Where the device waits for the host in a prefill: its busy and idle time, and the longest waits by neighbours."""
    rows = {}
    for shape, with_graphs in (("b1", True), ("b1", False), ("4 pictures", True), ("4 pictures", False)):
        inputs = bench.inputs(*SHAPES[shape])
        for name in [n for n in names if n in ("dense", "fastv")]:
            with attached(bench, name, graphs=with_graphs):
                for _ in range(3):
                    bench.prefill(inputs)
                synchronize()
                kinds = [torch.profiler.ProfilerActivity.CUDA] if CUDA else [torch.profiler.ProfilerActivity.CPU]
                with torch.profiler.profile(activities=kinds) as seen:
                    bench.prefill(inputs)
                    synchronize()
            key = f"{shape} {name}{' graphs' if with_graphs else ''}"
            rows[key] = waits(seen.events())
            say(f"gaps {key}: {rows[key]}")
    return rows


def waits(events):
    """Milliseconds busy and idle, and the five longest waits with what ran before and behind."""
    kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    ran = sorted((e.time_range.start, e.time_range.end, e.name[:40]) for e in events if e.device_type == kind)
    idle, last, found = 0.0, None, []
    for start, end, name in ran:
        if last is not None and start > last[0]:
            idle += start - last[0]
            found.append((round(start - last[0]), last[1], name))
        last = (end, name) if last is None or end > last[0] else last
    whole = (last[0] - ran[0][0]) / 1e3 if ran else 0.0
    longest = sorted(found, reverse=True)[:6]
    return {"ms": round(whole, 2), "idle": round(idle / 1e3, 2), "launches": len(ran), "longest us": longest}


def table(found, names):
    """One table of everything that was measured."""
    prefills, drawn = found.get("prefill", {}), found.get("graphs", {})
    heads = ["method", *prefills, *(f"{s} gr." for s in drawn), "equal", "syncs b1", "b8", "step", "decode", "compiled"]
    rows = [heads]
    for name in names:
        row = [name]
        for part in (prefills, drawn):
            row += [over(part[s]["ms"].get(name), part[s]["bare ms"]) for s in part]
        row.append("/".join(str(drawn[s]["equal"].get(name, {}).get("graphs", "-")) for s in drawn) or "-")
        asked = found.get("syncs", {}).get(name)
        row += [str(asked["b1"][0]), str(asked["b8 padded"][0]), str(asked["b1"][1])] if asked else ["-"] * 3
        stepped = found.get("decode")
        row.append(over(stepped["ms"].get(name), stepped["bare ms"]) if stepped else "-")
        fixed = found.get("compiled", {})
        row.append(over(fixed[name]["ms"], fixed["None"]["ms"]) if name in fixed and "None" in fixed else "-")
        rows.append(row)
    widths = [max(len(r[i]) for r in rows) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows)


def over(ms, base):
    return "-" if ms is None else f"{ms / base:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS[:-1]))
    parser.add_argument("--methods", nargs="+", default=[*NAMES, "fastv+debias"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=280, help="begin no further part after so many")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not CUDA:
        if not options.tiny:
            parser.error("there is no CUDA device here: --tiny shows that everything runs")
        captured.recorder = lambda model: Again
        torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    say(f"{device}; torch {torch.__version__}, transformers {transformers.__version__}, tiny {options.tiny}")
    bench, found = Bench(options), {"device": device}
    say("built")
    for part in options.part:
        if time.time() - START > options.seconds:
            say(f"no time left for {part}")
            continue
        try:
            found[part] = globals()[part](bench, options.methods, options)
        except Exception as error:
            say(f"FAILED {part}: {short(error)}")
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))
        free()
    say("done\n" + table(found, options.methods))


if __name__ == "__main__":
    main()
