"""The family matrix: every family with every method, against the dense model and the slow oracle.

`python -m evengaze.testing.matrix` prints it; `--write FILE` puts it between the marks in a Markdown file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evengaze.errors import DataError, UnsupportedModelError
from evengaze.methods import get
from evengaze.methods.base import Pruner
from evengaze.models import adapter_for
from evengaze.testing.models import families, implementations, layout_of, tiny
from evengaze.testing.oracle import replayed

_BEGIN, _END = "<!-- matrix -->", "<!-- end of matrix -->"

STEPS = 8
TOLERANCE = 2e-4
"""Relative to the largest logit: float32 sums in another order."""

METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"keep": 5, "layer": 2},
    "pyramiddrop": {"keep": (0.5, 0.25), "layers": (3, 5)},
    "sparsevlm": {"keep": (6, 3), "layers": (1, 3)},
    "himap": {"keep": (8, 4), "layers": (2, 4)},
    "tokencarve": {"keep": 5, "layer": 2},
    "illava": {"keep": 5, "layer": 2},
    "divprune": {"keep": 5, "layer": 0},
}
"""Parameters for decoders of six layers; the layers that are read attend to everything in every tiny model.
DivPrune stands for methods that drop tokens before the decoder."""

_ALL: dict[str, dict[str, Any]] = {
    name: {k: (tuple(10**6 for _ in v) if isinstance(v, tuple) else 10**6) if k == "keep" else v for k, v in p.items()}
    for name, p in METHODS.items()
}


@dataclass(frozen=True)
class Result:
    """One cell.

    Attributes:
        dense: with everything kept the logits equal the dense model's bit for bit.
        tokens: the pruned model generates the oracle's tokens.
        distance: largest difference between its logits and the oracle's, relative to the largest logit.
        effect: the same between pruned and dense: a test that pruning does something.
    """

    dense: bool
    tokens: bool
    distance: float
    effect: float

    @property
    def passed(self) -> bool:
        """Whether all three hold."""
        return self.dense and self.tokens and self.distance < TOLERANCE and self.effect > 10 * TOLERANCE


def check(family: str, method: str, attention: str = "sdpa", batch: int = 1, **inputs_: Any) -> Result:
    """Compare a pruned tiny model with the dense one and with the oracle over `STEPS` greedy tokens.

    Args:
        family: as for `tiny`.
        method: one of `METHODS`.
        attention: attention implementation of the pruned model; the oracle's is eager.
        batch: rows.
        inputs_: further arguments of `tiny`, such as `images=2` or `video=True`.
    """
    model, inputs = tiny(family, batch, attention, **inputs_)
    layout: dict[str, Any] = {"layout": layout_of(inputs)} if family == "llama" else {}
    everything, pruner = get(method)(**_ALL[method]), get(method)(**METHODS[method])
    _, dense = greedy(model, inputs)
    with everything(model, **layout):
        _, same = greedy(model, inputs)
    with pruner(model, **layout) as run:
        tokens, pruned = greedy(model, inputs)
    assert run.trace is not None
    expected, oracle = _expected(family, batch, pruner, run.trace, inputs, **inputs_)
    scale = float(oracle.abs().max())
    return Result(
        dense=torch.equal(dense, same),
        tokens=torch.equal(tokens, expected),
        distance=float((pruned - oracle).abs().max()) / scale,
        effect=float((pruned - dense).abs().max()) / scale,
    )


def _expected(
    family: str, batch: int, pruner: Pruner, trace: Any, inputs: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    model, _ = tiny(family, batch, "eager", **options)
    with replayed(model, pruner, trace, inputs["attention_mask"]):
        return greedy(model, inputs, use_cache=False)


def greedy(model: Any, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, steps) and the logits (B, steps, V) that decided them."""
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences[:, -steps:], torch.stack(out.logits, 1)


def cells(names: Sequence[str]) -> Iterator[tuple[str, str, str, int]]:
    """(family, method, attention, batch) of the whole matrix."""
    for name in names:
        yield from product([name], METHODS, implementations(name), (1, 3))


def table(names: Sequence[str], **where: Any) -> str:
    """Run everything and lay it out as a Markdown table, a row for each family.

    Args:
        names: of families.
        where: `device="cuda"`, say; any argument of `tiny`.
    """
    methods = list(METHODS)
    lines = [
        "| family | " + " | ".join(methods) + " | 2 images | text rows | video | tower cut |",
        "|---|" + "---|" * (len(methods) + 4),
    ]
    for name in names:
        able = implementations(name)
        one = able[0]
        found = [_mark(*(check(name, m, a, b, **where) for a, b in product(able, (1, 3)))) for m in methods]
        found.append(_mark(check(name, "fastv", one, images=2, **where)))
        found.append(_mark(check(name, "fastv", one, batch=3, images=[2, 0, 1], **where)))
        video = name in (*families(video=True), *families(video=True, generic=True))
        videos = [check(name, "fastv", one, batch=b, video=True, **where) for b in (1, 3)] if video else []
        found.append(_mark(*videos) if videos else "-")
        found.append(_tower(name))
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _mark(*results: Result) -> str:
    """The largest distance if all passed."""
    if all(r.passed for r in results):
        return f"{max(r.distance for r in results):.0e}"
    return "**fails**"


def _tower(family: str) -> str:
    """Whether patches can be dropped in the family's vision tower."""
    model, _ = tiny(family, attention=implementations(family)[0])
    try:
        adapter_for(model).vision_tower(model)
    except UnsupportedModelError:
        return "no"
    return "yes"


def main() -> None:
    """Print the table, or write it between the marks of a Markdown file."""
    parser = argparse.ArgumentParser(prog="python -m evengaze.testing.matrix", description=__doc__)
    parser.add_argument("families", nargs="*", help="all with an adapter of their own if left out")
    parser.add_argument("--generic", action="store_true", help="families of the generic adapter, if none are named")
    parser.add_argument("--device", default="cpu", help="where models and oracle run, such as cuda")
    parser.add_argument("--write", type=Path, help=f"a file with a line {_BEGIN} and a line {_END}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = table(options.families or families(generic=options.generic), device=options.device)
    if options.write is None:
        print(text)
        return
    before, _, rest = options.write.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise DataError(f"{options.write} has no lines {_BEGIN} and {_END}")
    options.write.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


if __name__ == "__main__":
    main()
