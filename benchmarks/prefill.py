"""Prefill of a mid-size random decoder: dense, FastV by evengaze, and FastV by attention maps and masks.

    python benchmarks/prefill.py [--hidden 1024 --layers 16 --keep 128 --rounds 7 --threads 2 --json out.json]

The third is what FastV's released evaluation script does: `output_attentions=True` with eager attention, and from
layer K on a mask in place of dropping. All run in turns in one process; times are ratios to the dense prefill of the
same round. Weights are random: they influence neither time nor memory. "Over FLOPs" compares processor time (wall time
on an accelerator) with the ratio that `evengaze.schedule` predicts.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import evengaze as eg
from evengaze.compat import cache_argument
from evengaze.debias import Exponential
from evengaze.profile import cache_bytes, clock_selection, interleave, peak_bytes, predict


class MaskedFastV:
    """FastV as a mask: layer K - 1's full attention map ranks, and later layers may not look at the rest."""

    def __init__(self, model, span, keep, layer):
        self.span, self.keep, self.mask = span, keep, None
        layers = model.model.layers
        self.hooks = [layers[layer - 1].self_attn.register_forward_hook(self.rank)]
        self.hooks += [x.register_forward_pre_hook(self.apply, with_kwargs=True) for x in layers[layer:]]

    def rank(self, module, args, output):
        start, stop = self.span
        attention = output[1].mean(1)[0, -1, start:stop]
        dropped = torch.ones_like(attention, dtype=torch.bool)
        dropped[attention.topk(self.keep).indices] = False
        length = output[1].shape[-1]
        low = torch.finfo(output[1].dtype).min
        self.mask = torch.full((length, length), low, dtype=output[1].dtype).triu(1)
        self.mask[:, start:stop].masked_fill_(dropped, low)
        self.mask = self.mask[None, None]

    def apply(self, module, args, kwargs):
        return args, {**kwargs, "attention_mask": self.mask}

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def build(options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 43 // 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        vocab_size=1024,
    )
    return LlamaForCausalLM(config).eval().to(options.device, getattr(torch, options.dtype))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--grid", type=int, default=24, help="side of the square of visual tokens")
    parser.add_argument("--text", type=int, default=60)
    parser.add_argument("--keep", type=int, default=128)
    parser.add_argument("--layer", type=int, default=2, help="first layer without the dropped tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = build(options)
    visual = options.grid**2
    length, span = visual + options.text, (options.text // 3, options.text // 3 + visual)
    embeds = torch.randn(1, length, options.hidden, generator=torch.Generator().manual_seed(1))
    embeds = embeds.to(options.device, getattr(torch, options.dtype))
    layout = eg.VisualLayout.from_spans([span], (options.grid, options.grid), image_sizes=[(400, 320)])
    debias = eg.Debias(padding=eg.PaddingMask(), trend=Exponential(2.0))
    pruner = eg.FastV(keep=options.keep, layer=options.layer, debias=debias)

    @torch.inference_mode()
    def prefill(**kwargs):
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=embeds, **cache_argument(model, cache), use_cache=True, logits_to_keep=1, **kwargs)
        return cache

    def dense():
        return prefill()

    def ours():
        with pruner(model, layout=layout):
            return prefill()

    def masks():
        model.set_attn_implementation("eager")
        hooks = MaskedFastV(model, span, options.keep, options.layer)
        try:
            return prefill(output_attentions=True)
        finally:
            hooks.remove()
            model.set_attn_implementation("sdpa")

    calls = {"dense": dense, "FastV, evengaze": ours, "FastV, maps + masks": masks}
    with clock_selection(pruner) as stages:
        times = interleave(calls, rounds=options.rounds)
    stage = min(stages[-options.rounds :])
    memory = {name: peak_bytes(call, options.device) for name, call in calls.items()}
    cache = {name: cache_bytes(call()) for name, call in calls.items()}
    saving = predict(pruner, model.config, visual, options.text)

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"
    print(
        f"{options.layers} layers x {options.hidden}, {visual} visual + {options.text} text tokens, {options.dtype}, "
        f"{options.device}, {options.threads} threads, {options.rounds} rounds; {versions}\n"
        f"FastV keep={options.keep} layer={options.layer}: predicted ratio to dense: FLOPs {saving.flops:.3f}, "
        f"KV cache {saving.kv:.3f}\n"
    )
    print(f"{'':<20}{'prefill s':^18}{'time / dense':^30}{'over':>8}{'peak memory':^18}{'KV cache':^16}")
    heads = ("median", "best", "median", "best", "CPU time", "FLOPs", "MB", "/ dense", "MB", "/ dense")
    print(f"{'':<20}" + "".join(f"{h:>{w}}" for h, w in zip(heads, (9, 9, 10, 10, 10, 8, 9, 9, 8, 8), strict=True)))
    rows = []
    base = times["dense"]
    for name in calls:
        time, flops = times[name], saving.flops if "evengaze" in name else 1.0
        ratio, best, cpu = time.ratio(base), time.best / base.best, time.cpu_ratio(base)
        over = (cpu if options.device == "cpu" else ratio) / flops - 1
        row = {
            "name": name,
            "median_seconds": time.median,
            "best_seconds": time.best,
            "time_ratio": ratio,
            "best_ratio": best,
            "cpu_time_ratio": cpu,
            "predicted_ratio": flops,
            "peak_bytes": memory[name],
            "kv_bytes": cache[name],
        }
        rows.append(row)
        print(
            f"{name:<20}{time.median:>9.3f}{time.best:>9.3f}{ratio:>10.3f}{best:>10.3f}{cpu:>10.3f}"
            f"{over:>+8.1%}{memory[name] / 1e6:>9.1f}{memory[name] / memory['dense']:>9.2f}"
            f"{cache[name] / 1e6:>8.1f}{cache[name] / cache['dense']:>8.3f}"
        )
    share = stage / base.best
    print(f"\nscoring + debiasing + choosing: {stage * 1e3:.2f} ms, {share:.3%} of the dense prefill (best of both)")
    if options.json:
        options.json.write_text(json.dumps({"options": {**vars(options), "json": None}, "rows": rows, "stage": share}))


if __name__ == "__main__":
    main()
