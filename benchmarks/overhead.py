"""What the methods' own work costs beside what it saves, on the prefill of a mid-size random decoder.

    python benchmarks/overhead.py [--hidden 1024 --layers 16 --rounds 5 --threads 1 --json out.json]

All methods are set to the same average number of visual tokens (`--average`, a share). "Choosing" is scoring, debiasing
and selection, "stage" is all that happens at a stage: also the extra queries and keys (PyramidDrop), cutting and
merging. Both are processor time over the processor time of the dense prefill of the same run. "Peak" is the most memory
beyond the weights, over the dense prefill's; one layer's attention map is given for comparison: no method may need one.

The second table is about TokenCarve's information contribution: the released code's full SVD against cheaper routes.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import process_time

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import evengaze as eg
from evengaze import methods
from evengaze.compat import cache_argument
from evengaze.debias import Debias, Exponential, PaddingMask
from evengaze.engine.prefill import Prefill
from evengaze.engine.session import Handle
from evengaze.methods.tokencarve import contribution
from evengaze.profile import interleave, peak_bytes, predict
from evengaze.protocol import top
from evengaze.schedule import solve_for_budget

NAMES = ["fastv", "pyramiddrop", "sparsevlm", "himap", "tokencarve", "illava"]
NAMES += ["random", "uniform", "pool", "divprune", "tome"]


class Clock:
    """Processor time spent in chosen functions, by the name of the call in progress."""

    def __init__(self):
        self.name, self.calls = "", {}

    def call(self, name, function):
        """`function`, of which every call gets an entry under `name`."""

        def run():
            self.name = name
            self.calls.setdefault(name, []).append({"choosing": 0.0, "stage": 0.0})
            return function()

        return run

    @contextmanager
    def watching(self, kind, owner, attribute):
        """Add the time of each call of a method of a class to the entry."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args, **kwargs):
            start = process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.calls[self.name][-1][kind] += process_time() - start

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            setattr(owner, attribute, original)

    def least(self, name, kind):
        """The call that other work on the machine disturbed least; the first is a warm-up."""
        return min(entry[kind] for entry in self.calls[name][1:])


def build(options):
    torch.manual_seed(0)
    heads = options.hidden // 64
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 43 // 16,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=1024,
    )
    model = LlamaForCausalLM(config).eval()
    visual = options.grid**2
    embeds = torch.randn(1, visual + options.text, options.hidden)
    layout = eg.VisualLayout.from_spans([(20, 20 + visual)], (options.grid, options.grid), image_sizes=[(400, 320)])

    @torch.inference_mode()
    def prefill(pruner=None):
        cache = DynamicCache(config=config)
        handle = None if pruner is None else pruner(model, layout=layout)
        try:
            model(inputs_embeds=embeds, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        finally:
            if handle is not None:
                handle.remove()

    return model, prefill


def overhead(options):
    """The first table: a row for each method."""
    model, prefill = build(options)
    visual = options.grid**2
    debias = Debias(PaddingMask(), Exponential(2.0))
    pruners = {}
    for name in NAMES:
        pruner = methods.get(name)(debias=debias)
        pruners[name] = solve_for_budget(pruner, options.average * visual, layers=options.layers, visual=visual)
    calls = {"dense": prefill} | {n: functools.partial(prefill, p) for n, p in pruners.items()}
    clock = Clock()
    with ExitStack() as stack:
        for kind in {type(pruner) for pruner in pruners.values()}:
            stack.enter_context(clock.watching("choosing", kind, "select"))
        stack.enter_context(clock.watching("stage", Prefill, "prune"))
        stack.enter_context(clock.watching("stage", Handle, "_read"))
        times = interleave({n: clock.call(n, c) for n, c in calls.items()}, rounds=options.rounds)
    reference = min(times["dense"].cpu)
    base = peak_bytes(prefill)
    rows = []
    for name, pruner in pruners.items():
        predicted = predict(pruner, model.config, visual, options.text)
        rows.append(
            {
                "method": methods.spec(pruner),
                "average": predicted.average,
                "prefill": times[name].cpu_ratio(times["dense"]),
                "predicted": predicted.flops,
                "choosing": clock.least(name, "choosing") / reference,
                "stage": clock.least(name, "stage") / reference,
                "peak": peak_bytes(calls[name]) / base,
            }
        )
    length = visual + options.text
    attention_map = 4 * model.config.num_attention_heads * length**2 / base
    return rows, {"dense seconds": reference, "dense peak bytes": base, "one attention map over it": attention_map}


def decompositions(options):
    """The second table: routes to the information contribution, and whether TokenCarve's choice stays the same."""
    torch.manual_seed(1)
    rows = []
    for tokens, width in ((576, 1024), (576, 4096)):
        # Features of a picture: smooth over the grid, with a decaying spectrum, and some noise.
        basis = torch.randn(64, width) * torch.logspace(1, -1, 64)[:, None]
        x = torch.randn(tokens, 64) @ basis + 0.3 * torch.randn(tokens, width)
        routes = {
            "full SVD (release)": lambda x: _from_svd(*torch.linalg.svd(x, full_matrices=True)[:2]),
            "reduced SVD": lambda x: contribution(x, exact=True),
            "Gram matrix, float64 (ours)": contribution,
            "Gram matrix, float32": lambda x: _from_gram(x),
            "randomised, rank 128": lambda x: _from_svd(*torch.svd_lowrank(x, q=128, niter=2)[:2]),
        }
        exact = contribution(x, exact=True)
        for route, function in routes.items():
            clock = []
            for _ in range(3):
                start = process_time()
                value = function(x)
                clock.append(process_time() - start)
            agree = {n: len(set(top(value, n).tolist()) & set(top(exact, n).tolist())) for n in (96, 192, 288)}
            rows.append(
                {
                    "features": f"{tokens} x {width}",
                    "route": route,
                    "seconds": min(clock),
                    "largest relative error": float(((value - exact).abs() / exact).max()),
                    "same top M": ", ".join(f"{k}/{n}" for n, k in agree.items()),
                }
            )
    return rows


def _from_svd(u, sigma):
    return (u[:, : len(sigma)].abs() * sigma).sum(-1)


def _from_gram(x):
    squares, u = torch.linalg.eigh(x @ x.T)
    return (u.abs() * squares.clamp(min=0).sqrt()).sum(-1)


def table(rows):
    """Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_cell(k, v) for k, v in row.items()) + " |")
    return "\n".join(lines)


def _cell(name, value):
    if not isinstance(value, float):
        return str(value)
    if name in ("choosing", "stage"):
        return f"{value:.2%}"
    return {"average": f"{value:.1f}", "largest relative error": f"{value:.0e}"}.get(name, f"{value:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--grid", type=int, default=24, help="side of the square of visual tokens")
    parser.add_argument("--text", type=int, default=60)
    parser.add_argument("--average", type=float, default=0.3, help="average visual tokens a layer, as a share")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, facts = overhead(options)
    routes = decompositions(options)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, {options}\n")
    print(table(rows))
    print("\n" + "; ".join(f"{k}: {v:.3g}" for k, v in facts.items()) + "\n")
    print(table(routes))
    if options.json:
        options.json.write_text(json.dumps({"methods": rows, "facts": facts, "contribution": routes}, indent=1))


if __name__ == "__main__":
    main()
