"""How many visual tokens enter each layer, what that costs, and which budget gives an asked-for average.

Tokens are counted where they *enter* a layer. A method that ranks with layer l and cuts its output (SparseVLM) pays for
layer l in full; counting that layer as already pruned, as some papers do, makes a method look cheaper than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

from evengaze.errors import ConfigError
from evengaze.protocol import Method, Scope, Stage

__all__ = ["DecoderShape", "Schedule", "Stage", "Visual", "solve_for_budget"]

Visual = int | Sequence[int | Sequence[int]]
"""Visual tokens of a prompt: of its one picture; or one entry a picture, which for a video or a picture in tiles lists
the tokens of each frame or tile. `[[64] * 8]` is a video of eight frames; `VisualTokens.counts` says it of a prompt."""


class Scheduled(Method, Protocol):
    """A method that says beforehand what its stages leave.

    Attributes:
        scope: what has a budget of its own: the prompt, each picture or video of it, or each frame or tile.
    """

    @property
    def scope(self) -> Scope: ...

    def size_after(self, stage: int, current: int, original: int) -> int:
        """Visual tokens that go on after a stage which `current` of the `original` ones reach."""

    def with_keep(self, tokens: int, visual: int) -> Self:
        """The same with about `tokens` of `visual` tokens left after its first stage."""


P = TypeVar("P", bound=Scheduled)


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that decide what a token costs. The defaults are those of LLaMA-7B (LLaVA-1.5-7B).

    Attributes:
        hidden: width of the residual stream, d.
        intermediate: width of the MLP, m; of a mixture, of all the experts that a token visits.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        mlp_matrices: 3 for a gated MLP (LLaMA, Qwen, Mistral, Gemma), 2 for a plain one (OPT, Phi-2).
        attention_weights: numbers in the matrices of a layer's attention. None for those of plain queries, keys, values
            and outputs.
        attention_width: widths of all query heads and of their values; None if both are `head_dim`.
        cache_width: numbers that a layer's cache holds of a token. None for keys and values of all `kv_heads`.
    """

    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    mlp_matrices: int = 3
    attention_weights: int | None = None
    attention_width: int | None = None
    cache_width: int | None = None

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Read the sizes from a transformers config, of a text model or of a vision-language model.

        A size that differs from layer to layer (dense layers between those with experts, layers without attention,
        Gemma 3n and 4), or between experts for text and for pictures (ERNIE 4.5 VL), is the mean of what the config
        says, rounded. Of layers with linear attention or convolutions only the matrices count, those that are not known
        (Mamba, convolutions) as those of attention. A window counts as the whole prompt, and so do indexed keys.
        """
        text = config.get_text_config()
        hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
        shape = cls(
            hidden=hidden,
            intermediate=_mlp_width(text),
            heads=heads,
            kv_heads=_size(text, "num_key_value_heads", heads),
            head_dim=_size(text, "head_dim", hidden // heads),
            mlp_matrices=2 if text.model_type in ("opt", "phi", "starcoder2", "gpt_neox") else 3,
        )
        return replace(shape, **_attention(text, shape))

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's matrices, of experts those that one token visits."""
        plain = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        attention = plain if self.attention_weights is None else self.attention_weights
        return attention + self.hidden * self.mlp_matrices * self.intermediate

    def layer_flops(self, tokens: int) -> int:
        """FLOPs (two for a multiply-add) of one layer's matrix products in a prefill of `tokens` tokens.

        Attention counts as n x n, as kernels that skip the causal half differ in how much of it they skip.
        """
        width = 2 * self.heads * self.head_dim if self.attention_width is None else self.attention_width
        return 2 * (tokens * self.layer_weights + tokens * tokens * width)

    def kv_bytes(self, tokens: int, dtype_bytes: int = 2) -> int:
        """Bytes of one layer's key/value cache of `tokens` tokens."""
        width = 2 * self.kv_heads * self.head_dim if self.cache_width is None else self.cache_width
        return width * tokens * dtype_bytes


@dataclass(frozen=True)
class Schedule:
    """Visual tokens of one prompt, layer by layer.

    Attributes:
        visual: visual tokens at the start.
        entering: how many of them enter each decoder layer.
        cached: how many of them each layer's cache holds after the prefill; less than `entering` below a stage
            that trims the caches there.
        name: the method, for `describe`.
    """

    visual: int
    entering: tuple[int, ...]
    cached: tuple[int, ...]
    name: str = ""

    @classmethod
    def of(cls, pruner: Scheduled, layers: int, visual: Visual) -> Schedule:
        """The schedule of a method on a decoder of `layers` layers, for `visual` tokens (no padding).

        Raises:
            ConfigError: a stage lies outside the model, or the stages are not in ascending order.
        """
        parts = current = _parts(visual, pruner.scope)
        total, before = sum(parts), -1
        entering, cached = [total] * layers, [total] * layers
        for i, stage in enumerate(pruner.stages(layers)):
            if not before < stage.layer < layers:
                raise ConfigError(
                    f"{pruner.name}: stage {i} at layer {stage.layer} of {layers} is out of order or range"
                )
            before = stage.layer
            current = [pruner.size_after(i, now, part) for now, part in zip(current, parts, strict=True)]
            start = 0 if stage.trims_below else stage.layer
            entering[stage.layer :] = [sum(current)] * (layers - stage.layer)
            cached[start:] = [sum(current)] * (layers - start)
        return cls(total, tuple(entering), tuple(cached), pruner.name)

    @property
    def layers(self) -> int:
        """Depth of the decoder."""
        return len(self.entering)

    @property
    def average(self) -> float:
        """Visual tokens entering a layer, averaged over the layers."""
        return sum(self.entering) / self.layers

    def paper_flops(
        self, hidden: int = 4096, intermediate: int = 11008, *, mlp_matrices: int = 2, text: int = 0
    ) -> int:
        """The papers' cost: the sum over layers of 4nd^2 + 2n^2d + (2 or 3)ndm, n the tokens entering the layer.

        FastV (arXiv 2403.06764, section 4.1) counts two MLP matrices; PyramidDrop and SparseVLM count three. Only
        visual tokens are counted unless `text` is given (SparseVLM's code counts all tokens).
        """
        return sum(_paper(v + text, hidden, intermediate, mlp_matrices) for v in self.entering)

    def paper_ratio(
        self, hidden: int = 4096, intermediate: int = 11008, *, mlp_matrices: int = 2, text: int = 0
    ) -> float:
        """`paper_flops` relative to the unpruned model."""
        dense = self.layers * _paper(self.visual + text, hidden, intermediate, mlp_matrices)
        return self.paper_flops(hidden, intermediate, mlp_matrices=mlp_matrices, text=text) / dense

    def flops(self, shape: DecoderShape, text: int = 0) -> int:
        """FLOPs of the decoder layers in the prefill, with the text and the model's real attention and MLP widths."""
        return sum(shape.layer_flops(v + text) for v in self.entering)

    def flop_ratio(self, shape: DecoderShape, text: int = 0) -> float:
        """`flops` relative to the unpruned model."""
        return self.flops(shape, text) / (self.layers * shape.layer_flops(self.visual + text))

    def kv_bytes(self, shape: DecoderShape, text: int = 0, dtype_bytes: int = 2) -> tuple[int, ...]:
        """Bytes of each layer's key/value cache after the prefill."""
        return tuple(shape.kv_bytes(v + text, dtype_bytes) for v in self.cached)

    def describe(self, shape: DecoderShape | None = None, text: int = 64, dtype_bytes: int = 2) -> str:
        """A table: tokens entering each run of equal layers, average, relative FLOPs and KV bytes.

        Args:
            shape: the decoder's sizes; LLaMA-7B's if left out.
            text: text tokens of the prompt.
            dtype_bytes: of one cache entry; 2 for float16 and bfloat16.
        """
        shape = shape or DecoderShape()
        kv = self.kv_bytes(shape, text, dtype_bytes)
        dense = self.layers * shape.kv_bytes(self.visual + text, dtype_bytes)
        lines = [f"{self.name or 'schedule'}: {self.visual} visual tokens, {self.layers} layers"]
        start = 0
        for layer in range(1, self.layers + 1):
            if layer == self.layers or self.entering[layer] != self.entering[start]:
                lines.append(f"  layers {start:>2}-{layer - 1:<2}  {self.entering[start]:>5} visual tokens enter")
                start = layer
        lines += [
            f"  average      {self.average:.2f} visual tokens a layer",
            f"  FLOPs        {self.paper_ratio(shape.hidden, shape.intermediate):.1%} by the papers' formula "
            f"(visual tokens only), {self.flop_ratio(shape, text):.1%} counted with {text} text tokens",
            f"  KV cache     {sum(kv) / 1e6:.1f} of {dense / 1e6:.1f} MB ({sum(kv) / dense:.1%})",
        ]
        return "\n".join(lines)

    @staticmethod
    def solve_for_budget(pruner: P, average_tokens: float = 128, *, layers: int, visual: Visual) -> P:
        """The same method with the budget that brings its average visual tokens a layer closest to `average_tokens`.

        Turns the method's one knob, `Pruner.with_keep`, by bisection; the lower budget wins a tie. With a `scope`, the
        knob is the budget of the largest picture or frame, while the average is that of the whole prompt.

        Raises:
            ConfigError: the average is out of the method's reach (its first stage comes too late, or it never prunes).
        """

        largest = max(_parts(visual, pruner.scope), default=1)

        def average(tokens: int) -> float:
            return Schedule.of(pruner.with_keep(tokens, largest), layers, visual).average

        low, high = 1, largest
        if not average(low) <= average_tokens <= average(high):
            raise ConfigError(
                f"{pruner.name} can average {average(low):.1f} to {average(high):.1f} of {sum(_parts(visual))} visual "
                f"tokens over {layers} layers, not {average_tokens}; "
                + ("prune at an earlier layer" if average_tokens < average(low) else "ask for less")
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if average(middle) <= average_tokens else (low, middle)
        best = min((low, high), key=lambda tokens: (abs(average(tokens) - average_tokens), tokens))
        return pruner.with_keep(best, largest)


solve_for_budget = Schedule.solve_for_budget


def _size(config: Any, name: str, default: int | None = None) -> int:
    """A size of a text config, averaged where there are several; the default where there is none.

    Raises:
        AttributeError: there is none, and no default.
    """
    try:
        value = getattr(config, name) if default is None else getattr(config, name, None) or default
    except RuntimeError:  # layers have it of their own, says transformers
        value = [getattr(layer, name) for layer in config.per_layer_config]
    return round(sum(value) / len(value)) if isinstance(value, Sequence) else int(value)


# Configs call the same by many names. A token visits `_CHOSEN` of `_EXPERTS`, which are `_WIDE`, and those that are
# shared: `_SHARED` of them, or all together `_SHARED_WIDE`.
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_WIDE = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDE = (
    *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"),
    *("shared_intermediate_size", "share_expert_dim"),
)
_DENSE_WIDE = ("dense_intermediate_size", "intermediate_size_mlp", "intermediate_size")
_WITHOUT_CACHE = ("linear_attention", "conv", "mamba")
_GATED = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
"""Decoders whose queries come with gates as wide as they are."""


def _any(text: Any, names: Sequence[str]) -> int:
    """The first of several sizes that a config has; 0 if none."""
    return next((size for name in names if (size := _size(text, name, 0))), 0)


def _mlp_width(text: Any) -> int:
    """Width of a layer's MLP, or of all the experts that a token visits there; the mean over the layers."""
    dense, kind = _any(text, _DENSE_WIDE), text.model_type.removesuffix("_text")
    if not (_any(text, _EXPERTS) and _any(text, _CHOSEN)):
        return _any(text, _SHARED_WIDE) or dense  # Granite's hybrids without experts have the shared one only
    wide = _any(text, _WIDE)
    shared = _any(text, _SHARED_WIDE) or _any(text, _SHARED) * wide
    if kind == "llama4":
        shared = wide
    elif kind == "gemma4":
        shared = dense  # its experts stand beside the MLP
    sparse = [_has_experts(text, layer) for layer in range(text.num_hidden_layers)]
    share = sum(sparse) / len(sparse)
    return round(share * (_any(text, _CHOSEN) * wide + shared) + (1 - share) * dense)


def _has_experts(text: Any, layer: int) -> bool:
    """Whether a layer of a mixture has experts, or an MLP like any other."""
    kinds, layers = getattr(text, "mlp_layer_types", None), getattr(text, "moe_layers", None)
    if kinds:
        return bool(kinds[layer] != "dense")
    if layers is not None:
        return layer in layers
    first = _any(text, ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"))
    last = getattr(text, "moe_layer_end_index", None)
    step = _any(text, ("decoder_sparse_step", "moe_layer_interval")) or 1
    without = getattr(text, "mlp_only_layers", None) or ()
    return first <= layer and (last is None or layer <= last) and (layer + 1) % step == 0 and layer not in without


def _attention(text: Any, shape: DecoderShape) -> dict[str, int]:
    """Sizes of attention that is not plain; none where it is."""
    hidden, heads = shape.hidden, shape.heads
    query, key = heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights, width, cache = 2 * hidden * (query + key), 2 * query, 2 * key
    rank, gated = _size(text, "kv_lora_rank", 0), text.model_type.removesuffix("_text") in _GATED
    kinds = getattr(text, "layer_types", None) or ["attention"]
    share = sum(kind not in _WITHOUT_CACHE for kind in kinds) / len(kinds)
    if not rank and not gated and share == 1:
        return {}
    if rank:  # latent attention: what is cached are latents, from which every head's keys and values are made
        rotary, plain, value = (_size(text, n, 0) for n in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        query, low = heads * (plain + rotary), _size(text, "q_lora_rank", 0)
        weights = low * (hidden + query) if low else hidden * query
        weights += hidden * (rank + rotary) + rank * heads * (plain + value) + heads * value * hidden
        width, cache = query + heads * value, rank + rotary
    if gated:
        weights += hidden * query
    other = weights
    if _size(text, "linear_key_head_dim", 0):  # the gated delta rule's queries, keys, values, outputs and gates
        count = _size(text, "linear_num_value_heads")
        keys = _size(text, "linear_num_key_heads") * _size(text, "linear_key_head_dim")
        other = hidden * (2 * keys + 3 * count * _size(text, "linear_value_head_dim") + 2 * count)
    return {
        "attention_weights": round(share * weights + (1 - share) * other),
        "attention_width": round(share * width),
        "cache_width": round(share * cache),
    }


def _parts(visual: Visual, scope: Scope = "prompt") -> list[int]:
    """Visual tokens of whatever has a budget of its own."""
    pictures = [visual] if isinstance(visual, int) else visual
    frames = [[picture] if isinstance(picture, int) else list(picture) for picture in pictures]
    if scope == "frame":
        return [tokens for picture in frames for tokens in picture]
    counts = [sum(picture) for picture in frames]
    return counts if scope == "image" else [sum(counts)]


def _paper(n: int, d: int, m: int, matrices: int) -> int:
    return 4 * n * d * d + 2 * n * n * d + matrices * n * d * m
