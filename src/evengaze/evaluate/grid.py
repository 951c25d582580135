"""Methods x debiasing x budgets on several benchmarks, the model loaded once, baselines at equal tokens beside them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evengaze import methods
from evengaze.debias import CurveWarning, Debias
from evengaze.errors import ConfigError, CurveError
from evengaze.evaluate.benchmarks import Benchmark, Record, ScoreOptions
from evengaze.evaluate.fingerprint import describe_pruner, digest
from evengaze.evaluate.results import About, CellInfo, CellResult, ResultRow, Role
from evengaze.evaluate.runner import Backend, Job, Outcome, limit_notes, overlap_notes, picture_notes, run_jobs
from evengaze.evaluate.setting import DEFAULT, Setting
from evengaze.methods import Pruner
from evengaze.parameters import coerce
from evengaze.schedule import Schedule, solve_for_budget

BASELINES = ("random", "uniform")
_PRESETS = "llava-1.5-7b"


@dataclass(frozen=True)
class Plan:
    """What a grid shall contain.

    Attributes:
        methods: strings as `methods.parse` takes them; "none" is the dense model, which is always there.
        debias: "none", "padding", "preset" (the method's published curve, mean over benchmarks), "published" (the
            curve published for this very benchmark, which was fitted on it), a preset's name or a curve file.
        budgets: average visual tokens a layer that every method is brought to; empty takes the methods as they are.
        baselines: run at the average tokens of every method.
    """

    methods: tuple[str, ...] = ("none",)
    debias: tuple[str, ...] = ("none",)
    budgets: tuple[float, ...] = field(default=(), metadata={"expected": "numbers of tokens"})
    baselines: tuple[str, ...] = BASELINES

    def __post_init__(self) -> None:
        coerce(self, "evaluation")
        if any(not 0 < budget < float("inf") for budget in self.budgets):
            raise ConfigError(f"budgets must be numbers of tokens, not {list(self.budgets)}")
        if self.budgets and not any(text not in ("none", "dense") for text in self.methods):
            raise ConfigError(
                f"budgets {list(self.budgets)} have no method to bring to them: name at least one, such as fastv"
            )


@dataclass(frozen=True)
class Cell:
    """One row of the table for one benchmark.

    Attributes:
        role: what it is there for.
        pruner: the method with its debiasing.
        debias: how the debiasing was asked for; "none" without any.
        average: average visual tokens a layer by its schedule, without padding.
        budget: average that was asked for; None if the method was taken as it is.
        baselines: names of the baseline cells at the same average.
    """

    role: Role
    pruner: Pruner
    debias: str
    average: float
    budget: float | None = None
    baselines: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The method's string, without debiasing."""
        return methods.spec(self.pruner)

    @property
    def name(self) -> str:
        """Name of its folder."""
        parts = [self.method, *([] if self.debias == "none" else [Path(self.debias).stem])]
        words = "+".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts)
        return f"{words[:80]}.{digest(describe_pruner(self.pruner))[:8]}"

    def described(self) -> CellInfo:
        """What its result says of it."""
        return CellInfo(
            name=self.name,
            role=self.role,
            method=self.method,
            family=self.pruner.name,
            debias=self.debias,
            average_planned=self.average,
            budget=self.budget,
            baselines=list(self.baselines),
        )


def cells(plan: Plan, benchmark: str, layers: int, visual: int, notes: list[str] | None = None) -> list[Cell]:
    """Lay out a grid: dense first, then every method plain and debiased, each followed by its baselines.

    Args:
        plan: what is wanted.
        benchmark: for "published" curves.
        layers: decoder layers of the model.
        visual: visual tokens of a picture.
        notes: gets a line for every combination that makes no sense, with the reason.

    Raises:
        ConfigError: an unknown method or parameter, or a budget out of a method's reach.
        CurveError: a curve file or preset that does not exist.
    """
    notes = [] if notes is None else notes
    found: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        found.setdefault(cell.name, cell)

    add(Cell("dense", methods.parse("dense"), "none", float(visual)))
    for text in plan.methods:
        if text in ("none", "dense"):
            continue
        given = methods.parse(text)
        for budget in plan.budgets or (None,):
            pruner = given if budget is None else solve_for_budget(given, budget, layers=layers, visual=visual)
            schedule = Schedule.of(pruner, layers, visual)
            average = schedule.average
            if budget is None and (said := _says(text, pruner, schedule)) is not None:
                notes.append(said)
            others = baselines(pruner, plan.baselines, layers, visual)
            names = tuple(other.name for other in others if other.method != methods.spec(pruner))
            if pruner.debias is not None:
                add(Cell("method", pruner, "own", average, budget, names))
            for label in plan.debias if pruner.debias is None else ():
                try:
                    steps = resolve(label, pruner, benchmark)
                except CurveError:
                    if label not in ("preset", "published"):
                        raise
                    notes.append(f"left out: {pruner.name} with {label}: no curve has been published for it")
                    continue
                if steps is not None and not pruner.ranked_stages(layers):
                    notes.append(f"left out: {pruner.name} with {label}: it does not rank by attention from text")
                    continue
                add(Cell("method", pruner.replace(debias=steps), label, average, budget, names))
            for other in others:
                add(other)
    return list(found.values())


def _says(text: str, pruner: Pruner, schedule: Schedule) -> str | None:
    """What a method's string does not say by itself: that it drops nothing, or what is left after each cut."""
    entering = schedule.entering
    if min(entering) == schedule.visual and pruner.name != "dense":
        return f"{text}: all {schedule.visual} visual tokens of the first picture stay; nothing is pruned"
    steps = [(layer, n) for layer, n in enumerate(entering) if layer and n != entering[layer - 1]]
    if len(steps) < 2 or methods.spec(pruner) == text:
        return None
    return f"{text}: {', '.join(f'{tokens} tokens from layer {layer}' for layer, tokens in steps)}"


def baselines(pruner: Pruner, names: Sequence[str], layers: int, visual: int) -> list[Cell]:
    """The baselines that cut at the same first layer and have the same average tokens."""
    stages = pruner.stages(layers)
    if not stages:
        return []
    average = Schedule.of(pruner, layers, visual).average
    made = []
    for name in names:
        blind = solve_for_budget(
            methods.parse(f"{name}:layer={stages[0].layer}"), average, layers=layers, visual=visual
        )
        made.append(Cell("baseline", blind, "none", Schedule.of(blind, layers, visual).average, average))
    return made


def resolve(label: str, pruner: Pruner, benchmark: str) -> Debias | None:
    """The debiasing that a label means for a method and a benchmark; see `Plan.debias`.

    Raises:
        CurveError: there is no such curve.
    """
    if label == "none":
        return None
    if label in ("preset", "published"):
        per_benchmark = label == "published" and pruner.name != "fastv"
        name = f"{_PRESETS}/{pruner.name}" + (f"/{benchmark.replace('-', '_')}" if per_benchmark else "")
        return Debias.preset(name, official=pruner.mode == "official")
    return Debias.parse(label)


@dataclass(frozen=True)
class Task:
    """A benchmark with its records and cells, ready to run.

    Attributes:
        benchmark: the benchmark.
        records: its questions.
        layers: decoder layers of the model.
        cells: what is to be run.
        notes: what to tell before the first answer.
    """

    benchmark: Benchmark
    records: list[Record]
    layers: int
    cells: list[Cell]
    notes: list[str]


def prepare(plan: Plan, benchmarks: Sequence[Benchmark], data: Path, backend: Backend) -> list[Task]:
    """Read all benchmarks and lay out all cells, so that whatever is wrong is found before the first answer.

    Raises:
        DataError: files of a benchmark are missing or malformed.
        ConfigError: see `cells`.
    """
    tasks = []
    for benchmark in benchmarks:
        notes = [f"{benchmark.name}: {note}" for note in benchmark.check(data)]
        records = list(benchmark.records(data))
        layers, visual = backend.geometry(records, benchmark.template)
        tasks.append(Task(benchmark, records, layers, cells(plan, benchmark.name, layers, visual, notes), notes))
    return tasks


def run_grid(
    tasks: Sequence[Task],
    data: Path,
    out: Path,
    backend: Backend,
    setting: Setting = DEFAULT,
    *,
    options: ScoreOptions | None = None,
    advance: Callable[[Task, Cell, int], None] = lambda task, cell, count: None,
) -> list[ResultRow]:
    """Run all cells of all benchmarks; a cell that the model cannot do is noted, and the others go on.

    Args:
        tasks: from `prepare`.
        data: where the benchmarks' files are.
        out: gets a folder for each benchmark, with one for each cell.
        backend: who answers.
        setting: how is asked.
        options: for the scorers.
        advance: told how many more records of which cell are done.

    Returns:
        What is in every cell's `result.json`, and where that is, in the grid's order.

    Raises:
        DataError: disk full, a folder in use, answers of another setting.
    """
    places = [(task, cell) for task in tasks for cell in task.cells]
    jobs = [
        (Job(task.benchmark, data, cell.pruner, out / task.benchmark.name / cell.name, setting), task.records)
        for task, cell in places
    ]
    rows: dict[int, ResultRow] = {}
    for index, outcome in run_jobs(
        jobs, backend, options=options, advance=lambda job, count: advance(*places[job], count)
    ):
        task, cell = places[index]
        rows[index] = ResultRow(_result(cell, outcome, _notes(cell, task, outcome)), outcome.job.folder)
        if not outcome.failed and not outcome.waiting:
            rows[index].save()
    return [rows[index] for index in sorted(rows)]


def _notes(cell: Cell, task: Task, outcome: Outcome) -> list[str]:
    """A debias curve of something else, or one that knows the pictures; pictures that were converted otherwise."""
    if cell.pruner.debiasing is None:
        return limit_notes(outcome) + picture_notes(outcome)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurveWarning)  # said in the result instead
        foreign = cell.pruner.debiasing.check(
            architecture=outcome.fingerprint["model"]["architecture"],
            method=cell.pruner.name,
            layer=cell.pruner.ranked_layer(task.layers),
        )
    notes = [f"The debias curve was calibrated elsewhere: it is used for {'; '.join(foreign)}."] if foreign else []
    return notes + limit_notes(outcome) + overlap_notes(outcome) + picture_notes(outcome)


def _result(cell: Cell, outcome: Outcome, notes: list[str]) -> CellResult:
    benchmark = outcome.job.benchmark
    return CellResult(
        benchmark=About(benchmark.name, benchmark.title, benchmark.split, benchmark.metric),
        cell=cell.described(),
        fingerprint=outcome.fingerprint,
        tokens=outcome.means(),
        answered=len(outcome.answers),
        errors={key: line["error"] for key, line in outcome.errors.items()},
        overlap=outcome.overlap,
        waiting=outcome.waiting,
        failed=outcome.failed,
        score=None if outcome.score is None else outcome.score.to_dict(),
        problem=outcome.problem,
        notes=notes,
    )
