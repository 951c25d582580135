"""How many visual tokens enter each layer, what that costs, and which budget gives an asked-for average.

Tokens are counted where they *enter* a layer. A method that ranks with layer l and cuts its output (SparseVLM) pays for
layer l in full; counting that layer as already pruned, as some papers do, makes a method look cheaper than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        intermediate: width of the MLP, m; of a mixture, of all the experts that a token is sent to.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        mlp_matrices: 3 for a gated MLP (LLaMA, Qwen, Mistral, Gemma), 2 for a plain one (OPT, Phi-2).
    """

    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    mlp_matrices: int = 3

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Read the sizes from a transformers config, of a text model or of a vision-language model.

        A size that differs from layer to layer (Gemma 3n and 4), or between experts for text and for pictures
        (ERNIE 4.5 VL), is the mean of what the config says, rounded. Experts that every token visits beside those that
        it is sent to are not counted.
        """
        text = config.get_text_config()
        hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
        experts = _size(text, "num_experts_per_tok", 0) or _size(text, "moe_topk", 0)  # Aria has a name of its own
        wide = _size(text, "moe_intermediate_size", 0) if experts else 0
        return cls(
            hidden=hidden,
            intermediate=(experts or 1) * (wide or _size(text, "intermediate_size")),
            heads=heads,
            kv_heads=_size(text, "num_key_value_heads", heads),
            head_dim=_size(text, "head_dim", hidden // heads),
            mlp_matrices=2 if text.model_type in ("opt", "phi", "starcoder2", "gpt_neox") else 3,
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's matrices, of experts those that one token is sent to."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * query + 2 * key + self.mlp_matrices * self.intermediate)

    def layer_flops(self, tokens: int) -> int:
        """FLOPs (two for a multiply-add) of one layer's matrix products in a prefill of `tokens` tokens.

        Attention counts as n x n, as kernels that skip the causal half differ in how much of it they skip.
        """
        attention = 2 * tokens * tokens * self.heads * self.head_dim
        return 2 * (tokens * self.layer_weights + attention)

    def kv_bytes(self, tokens: int, dtype_bytes: int = 2) -> int:
        """Bytes of one layer's key/value cache of `tokens` tokens."""
        return 2 * self.kv_heads * self.head_dim * tokens * dtype_bytes


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
