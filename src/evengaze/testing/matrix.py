"""The family matrix: every family with every method, against the dense model and the slow oracle.

`python -m evengaze.testing.matrix` prints it and ends with status 1 if a cell fails; `--write FILE` puts it between the
marks in a Markdown file; `--results FILE` keeps what has been measured, so that it can be stopped and continued.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evengaze.errors import UnsupportedModelError
from evengaze.methods import get
from evengaze.models import adapter_for
from evengaze.testing.markdown import put_between
from evengaze.testing.models import bare, families, layout_of, skipped, tiny
from evengaze.testing.oracle import replayed

ATTENTION = ("sdpa", "eager")
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
    model, inputs, dense = _dense(family, batch, attention, **inputs_)
    layout: dict[str, Any] = {"layout": layout_of(inputs)} if bare(family) else {}
    everything, pruner = get(method)(**_ALL[method]), get(method)(**METHODS[method])
    with everything(model, **layout):
        _, same = greedy(model, inputs)
    with pruner(model, **layout) as run:
        tokens, pruned = greedy(model, inputs)
    assert run.trace is not None
    eager, _, _ = _dense(family, batch, "eager", **inputs_)
    with replayed(eager, pruner, run.trace, inputs["attention_mask"]):
        expected, oracle = greedy(eager, inputs, use_cache=False)
    scale = float(oracle.abs().max())
    return Result(
        dense=torch.equal(dense, same),
        tokens=torch.equal(tokens, expected),
        distance=float((pruned - oracle).abs().max()) / scale,
        effect=float((pruned - dense).abs().max()) / scale,
    )


def _dense(family: str, batch: int, attention: str, **options: Any) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A tiny model, its inputs, and the logits of the model as it is."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return _made(family, batch, attention, **options)


@functools.lru_cache(maxsize=8)  # methods share them
def _made(family: str, batch: int, attention: str, **options: Any) -> tuple[Any, dict[str, Tensor], Tensor]:
    model, inputs = tiny(family, batch, attention, **options)
    return model, inputs, greedy(model, inputs)[1]


def greedy(model: Any, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, steps) and the logits (B, steps, V) that decided them."""
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences[:, -steps:], torch.stack(out.logits, 1)


@dataclass(frozen=True)
class Cell:
    """One comparison of the matrix.

    Attributes:
        family: as for `tiny`.
        method: one of `METHODS`.
        attention: attention implementation of the pruned model.
        batch: rows.
        images: pictures in each row, or of every row.
        video: videos in place of pictures.
    """

    family: str
    method: str
    attention: str
    batch: int
    images: int | tuple[int, ...] = 1
    video: bool = False

    @property
    def column(self) -> str:
        """Of the table."""
        if self.video:
            return "video"
        return self.method if self.images == 1 else "2 images" if self.images == 2 else "text rows"

    @property
    def key(self) -> str:
        """Its name in a file of results."""
        return json.dumps(asdict(self))


def cells(names: Iterable[str]) -> Iterator[Cell]:
    """All cells of some families, in order."""
    videos = {*families(video=True), *families(video=True, generic=True)}
    for name in names:
        for method, attention, batch in product(METHODS, ATTENTION, (1, 3)):
            yield Cell(name, method, attention, batch)
        for attention in ATTENTION:
            yield Cell(name, "fastv", attention, 1, images=2)
            yield Cell(name, "sparsevlm", attention, 3, images=(2, 0, 1))
        if name in videos:
            for attention, batch in product(ATTENTION, (1, 3)):
                yield Cell(name, "fastv", attention, batch, video=True)


Outcome = Result | str
"""What a cell gave: the comparison, or the error that ended it, which is a failure as well."""


def measure(wanted: Iterable[Cell], file: Path | None = None, **where: Any) -> dict[Cell, Outcome]:
    """Run cells.

    Args:
        wanted: the cells.
        file: JSON lines of results; cells that it holds are not run again, others are appended to it one by one.
        where: `device="cuda"`, say; any argument of `tiny`.
    """
    known: dict[str, Outcome] = {}
    if file is not None and file.exists():
        rows = (json.loads(line) for line in file.read_text().splitlines())
        known = {row["cell"]: row["error"] or Result(**row["result"]) for row in rows}
    found: dict[Cell, Outcome] = {}
    for cell in wanted:
        if cell.key not in known:
            known[cell.key] = _outcome(cell, **where)
            if file is not None:
                _append(file, cell, known[cell.key])
        found[cell] = known[cell.key]
    return found


def _outcome(cell: Cell, **where: Any) -> Outcome:
    options = {**asdict(cell), **where}
    try:
        return check(**options)
    except Exception as error:  # whatever a family raises is a failed cell, and the others are still of interest
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _append(file: Path, cell: Cell, outcome: Outcome) -> None:
    error = outcome if isinstance(outcome, str) else None
    row = {"cell": cell.key, "result": None if isinstance(outcome, str) else asdict(outcome), "error": error}
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def failures(found: Mapping[Cell, Outcome]) -> Iterator[str]:
    """A line for each cell that failed."""
    for cell, outcome in found.items():
        if isinstance(outcome, str) or not outcome.passed:
            yield f"{cell.key}: {outcome}"


def table(found: Mapping[Cell, Outcome]) -> str:
    """Outcomes as a Markdown table, a row for each family; the counts; and what was left out, with the reasons."""
    columns = [*METHODS, "2 images", "text rows", "video"]
    lines = [f"| family | {' | '.join(columns)} | tower cut |", "|---|" + "---|" * (len(columns) + 1)]
    names = list(dict.fromkeys(cell.family for cell in found))
    for name in names:
        of = {c: [o for cell, o in found.items() if (cell.family, cell.column) == (name, c)] for c in columns}
        lines.append(f"| {name} | {' | '.join(_mark(of[c]) for c in columns)} | {_tower(name)} |")
    failed = len(list(failures(found)))
    total = f"{len(names)} families, {len(found)} cells: {len(found) - failed} pass, {failed} fail."
    return "\n".join([*lines, "", f"{total} {_left_out(names)}".rstrip()])


def _left_out(names: Sequence[str]) -> str:
    """Which cells families lack, and why."""
    why: dict[str, list[str]] = {}
    for name in names:
        for reason in skipped(name):
            why.setdefault(reason, []).append(name)
    return " ".join(f"{reason}: {', '.join(of)}." for reason, of in why.items())


def _mark(outcomes: Sequence[Outcome]) -> str:
    """The largest distance if all passed."""
    passed = [o.distance for o in outcomes if not isinstance(o, str) and o.passed]
    if len(passed) < len(outcomes):
        return f"**{len(outcomes) - len(passed)} of {len(outcomes)} fail**"
    return f"{max(passed):.0e}" if passed else "-"


def _tower(family: str) -> str:
    """Whether patches can be dropped in the family's vision tower."""
    model, _ = tiny(family)
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
    parser.add_argument("--results", type=Path, help="a file of JSON lines that is read first and then continued")
    parser.add_argument("--write", type=Path, help="a Markdown file with marks around the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.families or families(generic=options.generic)
    found = measure(cells(names), options.results, device=options.device)
    text = table(found)
    if options.write is None:
        print(text)
    else:
        put_between(options.write, "generic matrix" if options.generic else "matrix", text)
    bad = list(failures(found))
    if bad:
        raise SystemExit("\n".join(["failed:", *bad]))


if __name__ == "__main__":
    main()
