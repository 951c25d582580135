"""The embedded model over many settings: accuracy, the paired difference that debiasing makes, average tokens.

    python benchmarks/demo_matrix.py --part layers            # FastV from layers 1, 2, 3 on, at four budgets
    python benchmarks/demo_matrix.py --part methods           # all that rank by attention, at equal average tokens

Every setting is asked the same questions, in an unmodified `generate`. Each method's trend is calibrated on pictures
of the calibration set, at the layer that it ranks by. Answers are appended to files in `OUT/PART` as they come, and
the same command goes on where it was stopped; give another `--out` for other settings or weights. `results.md` and
`results.json` hold the tables: accuracy with Wilson's 95 % interval, and the paired difference to the plain ranking
with a bootstrap's. Intervals are those of single comparisons; of many, some exclude zero by chance.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from evengaze import methods
from evengaze.calibration.calibrate import calibrate
from evengaze.demo import load, make_dataset
from evengaze.demo.experiment import (
    BASELINES,
    BATCH,
    DEBIAS,
    ORIGIN,
    Answers,
    Trial,
    ask,
    calibration_samples,
    debias_steps,
)
from evengaze.demo.model import FOLDER, choose_dtype, dtype_of
from evengaze.demo.report import difference, points, versions, wilson
from evengaze.evaluate.metrics.paired import compare
from evengaze.methods.fastv import FastV
from evengaze.schedule import solve_for_budget

DENSE = "dense"
RANKING = ("fastv", "pyramiddrop", "sparsevlm", "himap", "tokencarve", "illava")


@dataclass(frozen=True)
class Setting:
    """A method; those of one group are compared with its plain one."""

    group: str
    label: str
    pruner: methods.Pruner

    @property
    def name(self):
        return f"{self.group}: {self.label}"


def layers_part(model, processor, samples, options):
    """FastV with each debiasing, and the baselines, for every layer and budget."""
    depths = [int(k) for k in options.layers.split(",")]
    ranking = [k - 1 for k in depths]
    curve = calibrate(
        model, processor, samples, FastV(layer=depths[0]), layers=ranking, batch_size=BATCH, origin=ORIGIN
    )
    return [
        Setting(f"K={k}, {100 * keep:g} %", cell.label, cell.pruner(curve))
        for k in depths
        for keep in map(float, options.keeps.split(","))
        for cell in (
            *(Trial(keep, steps, layer=k) for steps in DEBIAS),
            *(Trial(keep, baseline=blind, layer=k) for blind in BASELINES),
        )
    ]


def methods_part(model, processor, samples, options):
    """Every method with each debiasing, and the baselines, with the same average tokens."""
    sizes = {"layers": model.config.text_config.num_hidden_layers, "visual": model.config.image_seq_length}
    names, budgets = options.methods.split(","), [float(b) for b in options.budgets.split(",")]
    solved = {(n, b): solve_for_budget(methods.get(n)(), b, **sizes) for n in (*names, *BASELINES) for b in budgets}
    # A trend belongs to a method and its layer, whatever the budget.
    curves = {
        n: calibrate(model, processor, samples, solved[n, budgets[0]], batch_size=BATCH, origin=ORIGIN) for n in names
    }
    found = []
    for budget in budgets:
        for name, curve in curves.items():
            for steps, label in DEBIAS.items():
                debias = debias_steps(steps, curve, curve.origin.layer)
                found.append(Setting(f"{name}, {budget:g}", label, solved[name, budget].replace(debias=debias)))
        found += [Setting(f"blind, {budget:g}", name, solved[name, budget]) for name in BASELINES]
    return found


PARTS = {"layers": layers_part, "methods": methods_part}


def plan(folder, options):
    """The settings, written down so that every later run answers the same ones."""
    asked = {name: getattr(options, name) for name in ("part", "layers", "keeps", "methods", "budgets", "calibration")}
    path = folder / "settings.json"
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        same = stored["asked"] == asked and stored["weights"] == weights()
        if not same or options.dtype not in ("auto", stored["dtype"]):
            sys.exit(f"{folder} holds answers of other settings or weights; give another --out")
        return stored
    model, processor = load(choose_dtype(options.dtype))
    samples = calibration_samples(make_dataset("calibration", options.calibration))
    settings = [Setting(DENSE, DENSE, methods.get(DENSE)()), *PARTS[options.part](model, processor, samples, options)]
    rows = [{"group": s.group, "label": s.label, "pruner": s.pruner.to_dict()} for s in settings]
    made = {"asked": asked, "weights": weights(), "dtype": dtype_of(model), "settings": rows}
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def weights():
    """SHA-256 of the model's file."""
    return (FOLDER / "model.safetensors.sha256").read_text(encoding="utf-8").split()[0]


def settings_of(stored):
    """Settings by name."""
    found = [Setting(s["group"], s["label"], methods.from_dict(s["pruner"])) for s in stored["settings"]]
    return {s.name: s for s in found}


def first_questions(pictures, count):
    """The first `count` questions; types take turns in the set."""
    return [q for p in pictures for q in p.questions][:count]


def answers(folder):
    """Answer and average tokens by setting and question, so far; a line that was cut off does not count."""
    found: dict[str, dict[int, tuple[str, float]]] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                found.setdefault(row["setting"], {})[row["question"]] = (row["answer"], row["tokens"])
            except (ValueError, KeyError, TypeError):
                continue
    return found


def work(folder, shard, shards, count, threads, progress):
    """Answer every `shards`-th question with every setting; `progress` counts answers."""
    torch.set_num_threads(threads)
    stored = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    model, processor = load(choose_dtype(stored["dtype"]))
    pictures = make_dataset("eval")
    questions = first_questions(pictures, count)[shard::shards]
    pruners = {name: setting.pruner for name, setting in settings_of(stored).items()}
    have = {name: set(found) for name, found in answers(folder).items()}

    def skip(name, batch):
        return have.get(name, set()).issuperset(q.question_id for q in batch)

    path = folder / f"answers-{shard}.jsonl"
    broken = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * broken)
        for name, batch, outcome, _ in ask(model, processor, pictures, questions, pruners, skip=skip):
            for question, average in zip(batch, outcome.average_tokens, strict=True):
                number = question.question_id
                row = {"setting": name, "question": number, "answer": outcome.answers[number], "tokens": average}
                file.write(json.dumps(row) + "\n")
            file.flush()
            with progress.get_lock():
                progress.value += len({q.question_id for q in batch} - have.get(name, set()))


def answer(folder, options, total):
    """Let the workers answer what is missing."""
    done = sum(map(len, answers(folder).values()))
    context = multiprocessing.get_context("spawn")
    progress = context.Value("l", 0)
    arguments = [
        (folder, i, options.workers, options.questions, options.threads, progress) for i in range(options.workers)
    ]
    if options.workers == 1:
        work(*arguments[0])
        return
    start = told = time.monotonic()
    workers = [context.Process(target=work, args=a, daemon=True) for a in arguments]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.5)
        now, new = time.monotonic(), progress.value
        if now - told >= 30 and new:
            told, left = now, (total - done - new) * (now - start) / new / 60
            print(f"{done + new} of {total} answers, about {left:.0f} min left", file=sys.stderr, flush=True)
    if any(worker.exitcode for worker in workers):
        sys.exit("a worker failed; the same command goes on from here")


def results(folder, stored, count):
    """The figures of every setting, on the questions that all of them have answered."""
    found, settings = answers(folder), settings_of(stored)
    common = set.intersection(*(set(found.get(name, ())) for name in settings))
    questions = [q for q in first_questions(make_dataset("eval"), count) if q.question_id in common]
    if not questions:
        sys.exit("no question has been answered by all settings yet")
    outcomes = {}
    for name in settings:
        texts, tokens = zip(*(found[name][q.question_id] for q in questions), strict=True)
        outcomes[name] = Answers(dict(zip((q.question_id for q in questions), texts, strict=True)), list(tokens))
    credits = {name: outcome.credits(questions) for name, outcome in outcomes.items()}
    dense, *_ = credits.values()
    rows = []
    for name, setting in settings.items():
        accuracy, plain = outcomes[name].accuracy(questions), credits.get(f"{setting.group}: plain")
        rows.append(
            {
                "group": setting.group,
                "label": setting.label,
                "method": methods.spec(setting.pruner),
                "accuracy": accuracy,
                "ci95": wilson(accuracy, len(questions)),
                "against_plain": None if plain is None or setting.label == "plain" else compare(credits[name], plain),
                "against_dense": None if setting.label == DENSE else compare(credits[name], dense),
                "average_tokens": sum(outcomes[name].average_tokens) / len(questions),
            }
        )
    return rows, len(questions)


def markdown(rows, count, stored):
    """Two tables: accuracy, and differences to plain."""
    dense, *others = rows
    labels = list(dict.fromkeys(row["label"] for row in others))
    groups: dict[str, dict[str, dict]] = {}
    for row in others:
        groups.setdefault(row["group"], {})[row["label"]] = row

    def table(heads, cell):
        lines = ["| setting | tokens | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
        for name, group in groups.items():
            tokens = next(iter(group.values()))["average_tokens"]
            cells = (cell(group[h]) if h in group else "" for h in heads)
            lines.append(f"| {name} | {tokens:.1f} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def share(row):
        return f"{points(row['accuracy'])} [{points(row['ci95'][0])}, {points(row['ci95'][1])}]"

    facts = ", ".join(f"{k} {v}" for k, v in versions().items() if k != "threads")
    debiased = [label for label in labels if label != "plain"]
    return (
        f"{count} questions; dense: {share(dense)} % with {dense['average_tokens']:.0f} tokens. Trends from "
        f"{stored['asked']['calibration']} pictures of the calibration set. Computed in {stored['dtype']}; weights "
        f"{stored['weights'][:12]}; {facts}.\n\nAccuracy in % with its 95 % interval:\n\n{table(labels, share)}\n\n"
        "Paired difference to plain in points, with its 95 % interval (of a single comparison):\n\n"
        + table(debiased, lambda row: difference(row["against_plain"]))
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=Path("demo-matrix"))
    parser.add_argument("--questions", type=int, default=1000, help="the first so many of the evaluation set")
    parser.add_argument("--calibration", type=int, default=64, help="pictures of the calibration set")
    parser.add_argument("--layers", default="1,2,3", help="layers: first layers without the dropped tokens")
    parser.add_argument("--keeps", default="0.5,0.25,0.125,0.06", help="layers: shares of the tokens")
    parser.add_argument("--methods", default=",".join(RANKING), help="methods: names")
    parser.add_argument("--budgets", default="78.4,58.4", help="methods: average tokens (FastV's at 25 and 12.5 %%)")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with its own share of the questions")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, or auto: the faster one")
    options = parser.parse_args(arguments)
    folder = options.out / options.part
    folder.mkdir(parents=True, exist_ok=True)
    stored = plan(folder, options)
    available = len(first_questions(make_dataset("eval"), options.questions))
    answer(folder, options, available * len(stored["settings"]))
    rows, count = results(folder, stored, options.questions)
    text = markdown(rows, count, stored)
    figures = [
        {k: asdict(v) if k.startswith("against") and v is not None else v for k, v in row.items()} for row in rows
    ]
    record = {**stored, "questions": count, "versions": versions(), "settings": figures}
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
