"""Which way of removing position bias leaves kept tokens where the content is: fits, families, and what goes beyond.

    python benchmarks/debias.py [--model demo --layers 1,2,3 --questions 300 --accuracy 160 --json out.json]

Trends are calibrated on the embedded calibration set and judged on the evaluation set. For every layer and budget:

* shift: mean kept index minus the mean index of what could be kept (0 is even);
* spread: total variation between the rows of kept tokens and of all that could be kept (0 is even);
* found: share of the patches of the asked things that is kept (more is better; `random` is what chance gives).

`--accuracy N` also answers N questions with tokens dropped before layer 2 by the ranking of layer 1; its intervals are
of the paired difference to the plain ranking with padding left out (95 %).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evengaze.calibration.families import fit_family
from evengaze.calibration.fit import choose_family
from evengaze.calibration.means import Profile, floored_log
from evengaze.calibration.observe import Sample, encode_batch, observed_layers, watching
from evengaze.calibration.rows_columns import fit_rows_columns
from evengaze.debias import Debias, PaddingMask, Prior, SampleTrend
from evengaze.demo import experiment, make_dataset
from evengaze.errors import CurveError
from evengaze.layout import VisualTokens
from evengaze.methods.fastv import FastV

BUDGETS = (0.25, 0.125, 0.06)
BATCH = 8
FITS = [
    (family, fit)
    for family in ("exponential", "exponential-floor", "polynomial", "isotonic", "auto")
    for fit in ("least-squares", "log", "geometric")
]

ANSWERED = (
    "exponential, least-squares",
    "exponential, log",
    "exponential-floor, least-squares",
    "auto, geometric",
    "rows-columns",
    "sample, 4 stretches",
    "grey picture",
)


@dataclass
class Recorded:
    """Raw scores by layer, and what the tokens show; all (questions, ...)."""

    scores: np.ndarray  # (questions, layers, tokens)
    null: np.ndarray  # the same pictures with an empty question
    norms: np.ndarray  # norms of the hidden states that enter the layer behind
    tables: list[VisualTokens]
    things: np.ndarray  # (questions, tokens) bool: patches of what is asked for

    @property
    def content(self):
        return np.stack([PaddingMask().valid(t).numpy() for t in self.tables])


def record(model, processor, layers, samples, empty):
    """Run the model over samples and the same samples with an empty question."""
    tables, found = {}, {}

    def keep(which):
        def sink(number, view, score):
            index = at[0] + view.rows[0]
            found[which, index, number] = score.float().numpy()
            found["norm", index, number] = view.features[0].float().norm(dim=-1).numpy()
            tables[index] = view.tokens.row(0)

        return sink

    for which, asked in (("null", empty), ("score", samples)):
        at = [0]
        with watching(model, FastV(keep=0.25, layer=layers[0] + 1), layers, keep(which)) as forward:
            for start in range(0, len(asked), BATCH):
                at[0] = start
                forward(encode_batch(processor, asked[start : start + BATCH]))

    def table(which):
        return np.array([[found[which, i, k] for k in range(len(layers))] for i in range(len(samples))])

    return Recorded(table("score"), table("null"), table("norm"), [tables[i] for i in range(len(samples))], None)


def ask(pictures, count):
    """The first `count` questions with their pictures, evenly over the pictures."""
    rounds = max(len(p.questions) for p in pictures)
    pairs = [(p, p.questions[k]) for k in range(rounds) for p in pictures if k < len(p.questions)]
    return pairs[:count]


def trends(calibration: Recorded, k: int, grey) -> dict[str, object]:
    """Every trend that is compared, by name, for the k-th recorded layer."""
    scores, content = calibration.scores[:, k].astype(float), calibration.content
    profile = Profile.from_scores(scores, content)
    grid = calibration.tables[0].images[0].grid
    found = {}
    for family, fit in FITS:
        try:
            chosen = choose_family(profile, fit) if family == "auto" else family
            found[f"{family}, {fit}"] = fit_family(chosen, profile.means(geometric=fit == "geometric"), fit)
        except CurveError:  # not positive: `None` is printed as a failure
            found[f"{family}, {fit}"] = None
    logs, count = np.zeros(content.shape[1]), content.sum(0)
    for score, good in zip(scores, content, strict=True):
        logs[good] += floored_log(score[good])[0]
    found["rows-columns"] = fit_rows_columns((logs / np.maximum(count, 1)).reshape(grid), count.reshape(grid) * 1.0)
    found |= {f"sample, {n} stretches": SampleTrend(n) for n in (2, 4, 7)}
    found["grey picture"] = Prior.of(grey[k])
    found["null question"] = "null"
    return found


def weights(trend, recorded: Recorded, k: int) -> np.ndarray:
    """(questions, tokens)."""
    rows = []
    for i, table in enumerate(recorded.tables):
        one = Prior.of(recorded.null[i, k]) if trend == "null" else trend
        rows.append(one.weights(table, torch.from_numpy(recorded.scores[i, k])).numpy())
    return np.stack(rows)


def judge(ranked, recorded: Recorded):
    """(budgets, 3): shift, spread, found of a ranking of the content."""
    height = recorded.tables[0].images[0].grid[0]
    x, row = recorded.tables[0].x.numpy(), recorded.tables[0].cell.numpy() // recorded.tables[0].images[0].grid[1]
    result = []
    for budget in BUDGETS:
        shift, found, kept_rows, all_rows = [], [], np.zeros(height), np.zeros(height)
        for score, good, thing in zip(ranked, recorded.content, recorded.things, strict=True):
            count = min(round(budget * len(x)), good.sum())
            kept = np.argsort(-np.where(good, score, -np.inf), kind="stable")[:count]
            shift.append(x[kept].mean() - x[good].mean())
            kept_rows += np.bincount(row[kept], minlength=height) / count
            all_rows += np.bincount(row[good], minlength=height) / good.sum()
            if thing.any():
                found.append(thing[kept].sum() / min(thing.sum(), count))
        result.append((np.mean(shift), np.abs(kept_rows - all_rows).sum() / 2 / len(ranked), np.mean(found)))
    return np.array(result)


def accuracy(model, processor, pairs, variants, budgets):
    """Right answers, (questions,) by name and budget."""
    right = {}
    pictures = list({p.name: p for p, _ in pairs}.values())
    pruners = {
        (name, budget): FastV(keep=budget, layer=2, debias=debias)
        for name, debias in variants.items()
        for budget in budgets
    }
    for key, batch, outcome, _ in experiment.ask(model, processor, pictures, [q for _, q in pairs], pruners):
        for q in batch:
            right.setdefault(key, {})[q.question_id] = outcome.answers[q.question_id] == q.answer
    order = [q.question_id for _, q in pairs]
    return {key: np.array([found[i] for i in order], float) for key, found in right.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo', or a folder with a model of the same kind")
    parser.add_argument("--layers", default="all", help="layers whose attention is ranked by")
    parser.add_argument("--calibration", type=int, default=128, help="questions of the calibration set")
    parser.add_argument("--questions", type=int, default=300, help="questions of the evaluation set")
    parser.add_argument("--accuracy", type=int, default=0, help="also answer so many questions")
    parser.add_argument("--budgets", default="0.125,0.06", help="shares of the tokens to answer with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.model == "demo":
        from evengaze import demo

        model, processor = demo.load()
    else:
        from transformers import AutoModelForImageTextToText

        from evengaze.models.loading import load_model, load_processor

        model = load_model(AutoModelForImageTextToText, options.model)[0].eval()
        processor = load_processor(options.model)

    wanted = "all" if options.layers == "all" else [int(k) for k in options.layers.split(",")]
    layers = observed_layers(model, FastV(layer=2), wanted)
    sets = {}
    for split, count in (("calibration", options.calibration), ("eval", options.questions)):
        pairs = ask(make_dataset(split), count)
        samples = [Sample(p.image, q.prompt) for p, q in pairs]
        empty = [Sample(p.image, q.prompt.replace(q.text, "")) for p, q in pairs]
        sets[split] = (pairs, record(model, processor, layers, samples, empty))
        tokens = sets[split][1].scores.shape[2]
        sets[split][1].things = np.array([np.isin(np.arange(tokens), q.object_patches) for _, q in pairs])
    colour = tuple(round(255 * m) for m in processor.image_processor.image_mean)
    side = make_dataset("calibration", 1)[0].image
    blank = [
        Sample(Image.new("RGB", (max(side.size),) * 2, colour), s)
        for s in {p[1].prompt for p in sets["calibration"][0][:16]}
    ]
    blank = [Sample(b.image, b.prompt) for b in sorted(blank, key=lambda b: b.prompt)]
    grey = record(model, processor, layers, blank, blank).scores.mean(0)

    (_, calibration), (pairs, evaluation) = sets["calibration"], sets["eval"]
    random = np.random.RandomState(0).rand(*evaluation.scores[:, 0].shape)
    table = {"plain": [], "random": []}
    for k in range(len(layers)):
        scores = evaluation.scores[:, k].astype(float)
        table["plain"].append(judge(scores, evaluation))
        table["random"].append(judge(random, evaluation))
        for name, trend in trends(calibration, k, grey).items():
            failed = trend is None
            table.setdefault(name, []).append(
                np.full((len(BUDGETS), 3), np.nan)
                if failed
                else judge(scores * weights(trend, evaluation, k), evaluation)
            )
    print(f"{len(evaluation.scores)} questions, {len(calibration.scores)} to calibrate, layers {layers}, no padding\n")
    print(
        "| trend | mean shift | mean spread | worst spread | "
        + " | ".join(f"found, layer 1, {b:.1%}" for b in BUDGETS)
        + " |"
    )
    print("|---|---|---|---|" + "---|" * len(BUDGETS))
    one = layers.index(1) if 1 in layers else 0
    for name, values in table.items():
        v = np.array(values)
        failed = [str(layers[k]) for k in range(len(layers)) if np.isnan(v[k]).any()]
        if failed:
            print(f"| {name} | not positive at layer {', '.join(failed)} | | | | | |")
            continue
        shift, spread, worst = np.abs(v[..., 0]).mean(), v[..., 1].mean(), v[..., 1].max()
        print(
            f"| {name} | {shift:.3f} | {spread:.3f} | {worst:.3f} | "
            + " | ".join(f"{f:.3f}" for f in v[one, :, 2])
            + " |"
        )
    ratio = [
        [n[g].max() / np.median(n[g]) for n, g in zip(evaluation.norms[:, k], evaluation.content, strict=True)]
        for k in range(len(layers))
    ]
    print("\nlargest hidden norm of a content token over the median, mean over questions, by layer:")
    print("  " + ", ".join(f"{layer}: {np.mean(r):.2f}" for layer, r in zip(layers, ratio, strict=True)))
    values = {n: np.nan_to_num(np.array(v), nan=-1).round(4).tolist() for n, v in table.items()}
    results = {"layers": list(layers), "budgets": BUDGETS, "neutrality": values}

    if options.accuracy:
        found = trends(calibration, one, grey)
        padding = PaddingMask()
        variants = {"plain": None, "padding": Debias(padding)}
        variants |= {f"{n} + padding": Debias(padding, found[n]) for n in ANSWERED if found[n] is not None}
        variants["auto, geometric alone"] = Debias(None, found["auto, geometric"])
        budgets = [float(b) for b in options.budgets.split(",")]
        right = accuracy(model, processor, pairs[: options.accuracy], variants, budgets)
        print("\n| ranking | " + " | ".join(f"{b:.1%}" for b in budgets) + " |")
        print("|---|" + "---|" * len(budgets))
        for name in ANSWERED:
            if found[name] is None:
                print(f"| {name} + padding | not positive at layer {layers[one]}" + " |" * len(budgets))
        for name in variants:
            cells = []
            for budget in budgets:
                gain = right[name, budget] - right["padding", budget]
                half = 1.96 * gain.std(ddof=1) / np.sqrt(len(gain))
                cells.append(f"{right[name, budget].mean():.3f} ({gain.mean():+.3f} ± {half:.3f})")
            print(f"| {name} | " + " | ".join(cells) + " |")
        results["accuracy"] = {f"{n} @ {b}": float(v.mean()) for (n, b), v in right.items()}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
