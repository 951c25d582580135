"""What methods have in common: one stage with a budget, or several, or groups; and the checks of their parameters."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from evengaze.errors import ConfigError
from evengaze.methods.base import Pruner
from evengaze.protocol import Selection, Source, Stage, View, resolve_keep

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class OneStage(Pruner):
    """A method that drops tokens once. It only has to say `score`.

    Attributes:
        keep: visual tokens left: a number, or a fraction in (0, 1].
        layer: the first decoder layer that runs without the others.
    """

    keep: float = 128
    layer: int = 2

    attention: ClassVar[Source] = "previous"
    """Whose attention `score` reads, as in `Stage`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_layer(self.layer, reads_previous=self.attention == "previous")

    def stages(self, layers: int) -> Sequence[Stage]:
        """One."""
        check_layer(self.layer, layers)
        return [Stage(self.layer, self.attention)]

    def budget(self, stage: int, current: int, original: int) -> int:
        """`keep`, as a number of tokens."""
        return resolve_keep(self.keep, original)

    def with_keep(self, tokens: int, visual: int) -> Self:
        """Another `keep`."""
        return self.replace(keep=tokens)


@dataclass(frozen=True)
class Grouping(OneStage):
    """A method that merges tokens into groups and ranks none, before the decoder if not told otherwise. It only has to
    say `group`.

    Attributes:
        keep: visual tokens left: a number, or a fraction in (0, 1].
        layer: where they are merged; 0 is before the decoder.
    """

    layer: int = 0

    attention: ClassVar[Source] = None

    def score(self, view: View) -> Tensor:
        """No token is better than another."""
        return torch.zeros(len(view.rows), len(view), device=view.hidden.device)

    def _select(self, view: View) -> Sequence[Selection]:
        count = self.count(view)
        if count >= len(view) and self.mode == "corrected":
            return [Selection.everything(view)]
        found = self.group(view, count)
        return [found] if isinstance(found, Selection) else found

    @abstractmethod
    def group(self, view: View, count: int) -> Selection | Sequence[Selection]:
        """Merge the candidates of each row into `count` groups."""


@dataclass(frozen=True)
class ManyStages(Pruner):
    """A method that drops tokens in several steps, three that halve if not told otherwise. It only has to say `score`.

    Attributes:
        keep: tokens left after each stage, numbers or fractions of the original number; a single value is the first
            stage's, and later ones keep `shrink` each.
        layers: the stage layers; None takes the published ones, which corrected mode scales to the decoder's depth.
    """

    keep: float | tuple[float, ...] = 0.5
    layers: tuple[int, ...] | None = None

    attention: ClassVar[Source] = "previous"
    published: ClassVar[tuple[int, ...]] = (8, 16, 24)
    """Stage layers for a decoder of 32 layers."""
    shrink: ClassVar[float] = 0.5
    """What later stages keep of the one before, if `keep` is a single value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.published if self.layers is None else self.layers
        check_layers(layers, reads_previous=self.attention == "previous")
        given = self.keep
        if isinstance(given, tuple) and given == self.__dataclass_fields__["keep"].default:
            # A method's own budgets serve other stages, too: the first ones, or more that shrink on.
            more = [given[-1] * self.shrink ** (i + 1) for i in range(len(layers) - len(given))]
            given = (*given[: len(layers)], *(m if isinstance(given[-1], float) else max(1, round(m)) for m in more))
        object.__setattr__(self, "_given", self.keep)
        object.__setattr__(self, "keep", per_stage(given, len(layers), self.shrink))

    def replace(self, **changes: Any) -> Self:
        """A copy with other parameters; for other `layers`, `keep` is what was given, a single value for instance."""
        if "layers" in changes and "keep" not in changes:
            changes["keep"] = self.__dict__["_given"]
        return super().replace(**changes)

    @property
    def budgets(self) -> tuple[float, ...]:
        """`keep`, one entry a stage."""
        assert isinstance(self.keep, tuple)
        return self.keep

    def stages(self, layers: int) -> Sequence[Stage]:
        """One for each of `layers`."""
        if self.layers is None:
            chosen = default_layers(self, self.published, layers)
        else:
            check_layers(chosen := self.layers, layers)
        return [Stage(layer, self.attention) for layer in chosen]

    def budget(self, stage: int, current: int, original: int) -> int:
        """The stage's `keep`, as a number of tokens."""
        return resolve_keep(self.budgets[stage], original)

    def with_keep(self, tokens: int, visual: int) -> Self:
        """`tokens` after the first stage, the others in proportion."""
        first, *_ = sizes = [resolve_keep(keep, visual) for keep in self.budgets]
        return self.replace(keep=tuple(max(1, round(tokens * size / first)) for size in sizes))


def check_keep(keep: float, name: str = "keep") -> None:
    """Raise a ConfigError unless `keep` is a positive number of tokens or a fraction in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ConfigError(f"{name} must be a number of tokens or a fraction in (0, 1], not {keep!r}")
    if not keep > 0:
        raise ConfigError(f"{name}={keep} would drop every visual token; give at least 1 token or a fraction in (0, 1]")
    if isinstance(keep, float) and keep > 1 and not keep.is_integer():
        raise ConfigError(f"{name}={keep} is neither a whole number of tokens nor a fraction in (0, 1]")


def per_stage(keep: float | tuple[float, ...], stages: int, factor: float) -> tuple[float, ...]:
    """Budgets of all stages, each a number of tokens or a fraction of the original ones.

    Args:
        keep: one budget a stage, or the first stage's, of which later stages keep `factor` each time.
        stages: number of stages.
        factor: in (0, 1].

    Raises:
        ConfigError: not one budget a stage, or one is out of range.
    """
    if isinstance(keep, tuple):
        if len(keep) != stages:
            raise ConfigError(f"keep has {len(keep)} entries for {stages} stages; give one a stage, or a single number")
    elif isinstance(keep, float) and keep <= 1:
        keep = tuple(keep * factor**i for i in range(stages))
    else:
        check_keep(keep)
        keep = tuple(max(1, round(keep * factor**i)) for i in range(stages))
    for value in keep:
        check_keep(value)
    return keep


def check_layer(layer: int, layers: int | None = None, *, reads_previous: bool = False, name: str = "layer") -> None:
    """Raise a ConfigError unless `layer` is a decoder layer at which a stage can act.

    Args:
        layer: 0-based.
        layers: depth of the decoder, where it is known.
        reads_previous: the stage needs the attention of the layer before.
        name: the parameter's name, for the message.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ConfigError(f"{name} must be the 0-based index of a layer, not {layer!r}")
    if reads_previous and layer == 0:
        raise ConfigError(f"{name}=0: no layer has run yet whose attention could rank the tokens; use {name} >= 1")
    if layers is not None and layer >= layers:
        raise ConfigError(f"{name}={layer} is outside the model: its decoder has layers 0 to {layers - 1}")


def check_layers(
    layers: tuple[int, ...], depth: int | None = None, *, reads_previous: bool = False, name: str = "layers"
) -> None:
    """`check_layer` for every stage; the layers must ascend."""
    if not isinstance(layers, tuple) or not layers:
        raise ConfigError(f"{name} must be a sequence of layers such as [2,8], not {layers!r}")
    for layer in layers:
        check_layer(layer, depth, reads_previous=reads_previous, name=name)
    if any(a >= b for a, b in itertools.pairwise(layers)):
        raise ConfigError(f"{name}={layers} must ascend")


def default_layers(
    method: Pruner, published: tuple[int, ...], depth: int, *, first: int = 1, behind: int = 0
) -> tuple[int, ...]:
    """The stage layers of a method that was given none: the published ones, scaled in corrected mode.

    Args:
        method: the method.
        published: for a decoder of 32 layers.
        depth: of the decoder at hand.
        first: see `scale_layers`.
        behind: how many layers behind a stage layer the tokens leave.

    Raises:
        ConfigError: the decoder is too shallow for them.
    """

    def chosen(depth: int) -> tuple[int, ...]:
        return published if method.mode == "official" else scale_layers(published, depth, first=first)

    found = chosen(depth)
    if found[-1] + behind >= depth:
        least = next(d for d in itertools.count(depth + 1) if chosen(d)[-1] + behind < d)
        raise ConfigError(
            f"{method.name} needs at least {least} decoder layers for its default stages, this decoder has {depth}; "
            "give layers= (and a keep that fits them)"
        )
    return found


def scale_layers(published: tuple[int, ...], depth: int, *, of: int = 32, first: int = 1) -> tuple[int, ...]:
    """Stage layers published for a decoder of `of` layers, at the same relative depth; distinct, `first` or later."""
    return tuple(max(i, round(layer * depth / of)) for i, layer in enumerate(published, start=first))
