"""Run a tiny Llama under a pruner and write down everything that the recorded cases compare."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from evengaze.compat import cache_argument
from evengaze.layout import VisualLayout, VisualTokens
from evengaze.methods.base import Pruner
from evengaze.methods.ranking import Ranking
from evengaze.protocol import Selection, View


class Report:
    """What a case's comparison found."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.failures: list[str] = []
        self.seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def want(self, name: str) -> Tensor:
        self.seen.add(name)
        value = torch.from_numpy(np.asarray(self.arrays[name]))
        return value if value.dtype.is_floating_point else value.long()

    def close(self, name: str, got: Any, *, atol: float, rtol: float = 0.0) -> None:
        if name not in self.arrays:
            return
        want, got = self.want(name).double(), torch.as_tensor(got).double()
        if want.shape != got.shape:
            self.fail(f"{name}: shape {tuple(got.shape)}, recorded {tuple(want.shape)}")
        elif not torch.allclose(got, want, atol=atol, rtol=rtol):
            self.fail(f"{name}: differs by up to {(got - want).abs().max():.2e} (atol {atol}, rtol {rtol})")

    def equal(self, name: str, got: Any) -> None:
        if name not in self.arrays:
            return
        want, got = self.want(name), torch.as_tensor(got).long()
        if want.shape != got.shape or not torch.equal(want, got):
            self.fail(f"{name}: {_difference(got, want)}")

    def same_set(self, name: str, got: Any) -> None:
        if name in self.arrays:
            want, got = self.want(name).sort().values, torch.as_tensor(got).long().sort().values
            if want.shape != got.shape or not torch.equal(want, got):
                self.fail(f"{name}: {_difference(got, want)}")

    def sorts(self, name: str, score: Tensor, rtol: float) -> None:
        """The recorded order sorts our scores, up to rounding."""
        ordered = score.double()[self.want(name)]
        if bool((ordered[1:] - ordered[:-1] > rtol * score.abs().max()).any()):
            self.fail(f"{name}: the recorded order does not sort the scores")

    def waive(self, *names: str) -> None:
        """Inputs of the case, or values that others imply."""
        self.seen.update(names)

    def fail(self, message: str) -> None:
        self.failures.append(message)

    def finish(self) -> list[str]:
        missed = sorted(set(self.arrays) - self.seen)
        return self.failures + ([f"never compared: {', '.join(missed)}"] if missed else [])


def _difference(got: Tensor, want: Tensor) -> str:
    if got.dim() == want.dim() == 1:
        extra, missing = set(got.tolist()) - set(want.tolist()), set(want.tolist()) - set(got.tolist())
        return f"{len(got)} entries, recorded {len(want)}; extra {sorted(extra)[:5]}, missing {sorted(missing)[:5]}"
    return f"shape {tuple(got.shape)}, recorded {tuple(want.shape)}, or other entries"


@dataclass
class Folder:
    """A folder of recorded cases."""

    path: Path
    attention: str = "eager"  # as most of the official code ran, and so the closest in rounding
    index: dict[str, Any] = field(init=False)
    weights: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.index = json.loads((self.path / "cases.json").read_text())
        self.weights = json.loads((self.path / "weights.json").read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.path / name, allow_pickle=False) as data:
            return dict(data)

    def model(self, config: str, weights: str) -> LlamaForCausalLM:
        config = LlamaConfig.from_dict(json.loads((self.path / config).read_text()))
        model = LlamaForCausalLM._from_config(config, attn_implementation=self.attention).eval()
        model.load_state_dict(load_file(self.path / weights))
        return model


@dataclass
class Entry:
    """What became of one row in one call of `choose`; no tensor has an axis of rows."""

    view: View
    selection: Selection
    raw: Tensor
    score: Tensor
    features: Tensor
    details: dict[str, Tensor]

    @property
    def tokens(self) -> VisualTokens:
        return self.view.tokens.row(0)


def recording(
    pruner: Pruner,
    log: list[Entry],
    *,
    prefer: dict[int, Tensor] | None = None,
    noise: dict[int, Tensor] | None = None,
) -> Pruner:
    """The same pruner, which logs what it selects.

    Args:
        prefer: recorded choices by stage, followed where scores are tied at zero: what the official code does with
            ties is left open by PyTorch.
        noise: recorded draws by stage, for SparseVLM.
    """
    base = type(pruner)

    class Recording(base):  # type: ignore[valid-type,misc]
        def ranked(self, view: View) -> Ranking:
            ranking = super().ranked(view)
            self.__dict__["scores"], self.__dict__["details"] = ranking.score, {}
            score = ranking.score
            if prefer and view.stage in prefer and bool((score > 0).any()):
                tied = torch.zeros_like(score, dtype=torch.bool)
                tied[:, prefer[view.stage]] = True
                score = torch.where(tied & (score == 0), score[score > 0].min() / 2, score)
            return replace(ranking, score=score)

        def density_noise(self, view: View, count: int) -> Tensor | None:
            return 1e-6 * noise[view.stage] if noise else super().density_noise(view, count)

        def rate(self, *args: Any) -> Any:
            rated = super().rate(*args)
            self.__dict__["details"].update(contribution=rated.contribution, rank_sum=rated.rank)
            return rated

        def pairs(self, features: Tensor, better: Tensor, worse: Tensor) -> Any:
            closeness, partner = super().pairs(features, better, worse)
            self.__dict__["details"].update(better=better, worse=worse, closeness=closeness, partner=partner)
            return closeness, partner

        def choose(self, view: View, ranking: Ranking, count: int) -> Selection:
            features = view.features.clone() if view.hidden.shape[1] > 1 else view.hidden
            selection = super().choose(view, ranking, count)
            for b, one in enumerate(view.split()):
                merge = None if selection.merge is None else selection.merge.row(b)
                recycled = None if selection.recycled is None else selection.recycled[b]
                row = Selection(selection.keep[b], merge, recycled)
                details = {k: v[b] for k, v in self.__dict__["details"].items()}
                log.append(Entry(one, row, ranking.raw[b], self.__dict__["scores"][b], features[b], details))
            return selection

    copy = object.__new__(Recording)
    copy.__dict__.update(pruner.__dict__)
    return copy


@dataclass
class Call:
    """One forward call: per layer what came in and went out."""

    logits: Tensor
    inputs: list[Tensor]
    positions: list[Tensor]
    last: list[Tensor]
    prenorm: Tensor
    norm: Tensor
    cached: list[int]


@dataclass
class Recorded:
    """A prompt and its teacher-forced continuation."""

    log: list[Entry]
    prefill: Call
    steps: list[Call]


def run(
    model: LlamaForCausalLM,
    embeds: Tensor,
    tokens: list[int],
    pruner: Pruner | None = None,
    layout: VisualLayout | None = None,
    *,
    cached: bool = True,
    **recorded: Any,
) -> Recorded:
    """Prefill, then feed `tokens` one by one; with a cache, or with the whole sequence each time."""
    log: list[Entry] = []
    handle = None if pruner is None else recording(pruner, log, **recorded)(model, layout=layout)
    try:
        with torch.inference_mode():
            cache = DynamicCache() if cached else None
            calls = [_call(model, cache, inputs_embeds=embeds)]
            for token in tokens:
                if cached:
                    calls.append(_call(model, cache, input_ids=torch.tensor([[token]])))
                else:
                    embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[token]]))], 1)
                    calls.append(_call(model, None, inputs_embeds=embeds))
    finally:
        if handle is not None:
            handle.remove()
    return Recorded(log, calls[0], calls[1:])


def _call(model: LlamaForCausalLM, cache: DynamicCache | None, **inputs: Any) -> Call:
    seen: dict[str, list[Any]] = {"inputs": [], "positions": [], "last": [], "norm": []}

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        seen["inputs"].append((args[0] if args else kwargs["hidden_states"]).clone())
        seen["positions"].append(kwargs["position_ids"].expand(len(seen["inputs"][-1]), -1).clone())

    def leave(module: Any, args: Any, out: Any) -> None:
        seen["last"].append((out[0] if isinstance(out, tuple) else out)[:, -1].clone())

    def norm(module: Any, args: Any, out: Any) -> None:
        seen["norm"] += [args[0][:, -1].clone(), out[:, -1].clone()]

    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    hooks += [model.model.norm.register_forward_hook(norm)]
    try:
        out = model(**inputs, **cache_argument(model, cache), use_cache=cache is not None)
    finally:
        for hook in hooks:
            hook.remove()
    lengths = [] if cache is None else [layer.keys.shape[-2] for layer in cache.layers]
    return Call(out.logits[:, -1], seen["inputs"], seen["positions"], seen["last"], *seen["norm"], lengths)
