"""Comparisons of the image benchmarks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golden_helpers import analyse_official, chunk_range, inferred_options
from golden_judge import mmvet
from golden_text import load

from evengaze.evaluate.benchmarks import BENCHMARKS, Benchmark, OfficialError, Record, ScoreOptions
from evengaze.evaluate.benchmarks.mmbench import MMBench
from evengaze.evaluate.benchmarks.mmbench_cn import MMBenchCN
from evengaze.evaluate.benchmarks.mme import MME
from evengaze.evaluate.benchmarks.pope import POPE
from evengaze.evaluate.benchmarks.scienceqa import ScienceQA
from evengaze.evaluate.jsonl import read_jsonl
from evengaze.evaluate.metrics import gqa as gqa_metric
from evengaze.evaluate.metrics.mme import read_label
from evengaze.evaluate.metrics.pope import text_to_label
from evengaze.evaluate.metrics.scienceqa import option_index, parse_answer
from evengaze.evaluate.templates import render_template

if TYPE_CHECKING:
    from run_golden import Report

EVAL = "playground/data/eval"


def answers_of(data: Path, folder: str, name: str) -> Path:
    """Find an answer file: ``answers/[<split>/]<name>.jsonl`` or ``.../<name>/merge.jsonl``."""
    base = data / EVAL / folder / "answers"
    found = [*base.rglob(f"{name}.jsonl"), *base.rglob(f"{name}/merge.jsonl")]
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} answer files {name} below {base}")
    return found[0]


def outcome(
    benchmark: Benchmark, answers: Path, data: Path, options: ScoreOptions | None = None
) -> tuple[Any, str | None]:
    """Score in official mode; return (score, None) or (None, the error's type)."""
    try:
        return benchmark.score(answers, data, "official", options), None
    except OfficialError as error:
        return None, error.official


def error_type(text: str | None) -> str | None:
    return None if text is None else text.split(":")[0]


def prompts(report: Report, data: Path, path: str, benchmark: Benchmark, records: Iterable[Record]) -> None:
    """Compare full prompts and generation settings with those of the official inference script."""
    recorded = load(data, path)
    found = list(records)
    report.check(f"{path} count", len(found), len(recorded["items"]))
    for record, item in zip(found, recorded["items"], strict=False):
        marker = "<image>" * 8 + "\n" if record.video else "<image>\n" if record.image else ""
        report.check(
            f"{path} {record.key}", render_template(benchmark.template, marker + record.prompt), item["prompt"]
        )
        kwargs = {**recorded["common"]["generate_kwargs"], **item.get("generate_kwargs", {})}
        settings = [kwargs["max_new_tokens"], kwargs["temperature"], kwargs.get("num_beams", 1)]
        report.check(f"{path} {record.key} settings", [benchmark.max_new_tokens, 0.0, 1], settings)
        has_media = record.image is not None or record.video is not None
        report.check(f"{path} {record.key} media", has_media, item.get("has_image", recorded["common"]["has_image"]))
        identity = item.get("question_id", item.get("id"))
        if identity is not None:
            report.check(f"{path} {record.key} id", record.question_id, identity)


def chunked(report: Report, data: Path, folder: str, n_chunks: int, questions: str) -> None:
    """Compare how the official run was divided over processes and merged."""
    rows = read_jsonl(data / EVAL / folder / questions, ("question_id",)).records
    for first in sorted((data / EVAL / folder / "answers").rglob(f"{n_chunks}_0.jsonl")):
        parts = [first.with_name(f"{n_chunks}_{i}.jsonl").read_text(encoding="utf-8") for i in range(n_chunks)]
        merged = first.with_name("merge.jsonl").read_text(encoding="utf-8")
        report.check(f"{folder} {first.parent.name} merge", "".join(parts), merged)
        for i, part in enumerate(parts):
            got = [json.loads(line)["question_id"] for line in part.splitlines()]
            wanted = [rows[k]["question_id"] for k in chunk_range(len(rows), n_chunks, i)]
            report.check(f"{folder} {first.parent.name} chunk {i}", wanted, got)


def submission(report: Report, data: Path, benchmark: Benchmark, answers: Path, entry: Any, name: str) -> None:
    """Compare a converted submission, or where the converter stops."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        try:
            summary = benchmark.write_submission(answers, data, out)
        except OfficialError as error:
            report.check(f"{name} error", error_type(error.official), error_type(entry.get("error")))
            return
        report.check(f"{name} error", None, entry.get("error"))
        line = "total results: {total_results}, total split: {total_split}, error_line: {error_line}".format(**summary)
        report.check(f"{name} summary", line, entry["stdout"].strip())
        report.check(f"{name} content", json.loads(out.read_text()), load(data, entry["submission"]))
        if "n_empty" in entry:
            report.check(f"{name} empty", [summary["total_split"], summary["empty"]], [entry["n"], entry["n_empty"]])


def vqav2(report: Report, data: Path, entry: Any) -> None:
    benchmark = BENCHMARKS["vqav2"]
    for name, item in entry["convert"].items():
        submission(report, data, benchmark, answers_of(data, "vqav2", name), item, f"vqav2 {name}")
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))
    chunked(report, data, "vqav2", entry["num_chunks"], "llava_vqav2_mscoco_test-dev2015.jsonl")
    folder = data / EVAL / "vqav2/offline_val"
    score = BENCHMARKS["vqav2_val"].score(folder / "answers.jsonl", folder, "official")
    for name, got in (("evalai_processed", score.metrics), ("raw", score.metrics["raw_answers"])):
        want = entry["offline_val"][name]
        for key, value in want["accuracy_12dp"].items():
            report.check(f"vqav2 offline_val {name} {key}", rounded(got[key], 12), value)
            report.check(
                f"vqav2 offline_val {name} {key} 2dp", rounded(got[key], 2), want["accuracy_official_2dp"][key]
            )
        per_question = {key: round(100 * credit, 2) for key, credit in got["per_record"].items()}
        report.check(f"vqav2 offline_val {name} per question", per_question, want["per_question_2dp"])


def rounded(value: Any, digits: int) -> Any:
    return {k: rounded(v, digits) for k, v in value.items()} if isinstance(value, dict) else round(value, digits)


def vizwiz(report: Report, data: Path, entry: Any) -> None:
    benchmark = BENCHMARKS["vizwiz"]
    for name, item in entry["convert"].items():
        submission(report, data, benchmark, answers_of(data, "vizwiz", name), item, f"vizwiz {name}")
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))
    folder = data / EVAL / "vizwiz/offline_val"
    score = BENCHMARKS["vizwiz_val"].score(folder / "answers.jsonl", folder, "official")
    report.check("vizwiz offline_val", score.metrics["accuracy"], entry["offline_val"]["accuracy"])
    per_question = [float(credit) for credit in entry["offline_val"]["per_question"]]
    report.check("vizwiz offline_val per question", list(score.per_record.values()), per_question)


def textvqa(report: Report, data: Path, entry: Any) -> None:
    benchmark = BENCHMARKS["textvqa"]
    for name, item in entry["scores"].items():
        score, error = outcome(benchmark, answers_of(data, "textvqa", name), data)
        report.check(f"textvqa {name} error", error, item.get("error"))
        if score is not None:
            report.check(f"textvqa {name} accuracy", score.metrics["accuracy"], item["accuracy"])
            report.check(f"textvqa {name} per record", list(score.per_record.values()), item["per_record"])
            printed = f"{name}\nSamples: {score.n_scored}\nAccuracy: {score.value:.2f}%"
            report.check(f"textvqa {name} printed", printed, item["stdout"].strip())
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))


def pope(report: Report, data: Path, entry: Any) -> None:
    benchmark = POPE()
    for text, label in entry["text_to_label"]:
        report.check(f"pope {text!r}", text_to_label(text), label)
    for name, item in entry["scores"].items():
        answers = answers_of(data, "pope", name)
        score, error = outcome(benchmark, answers, data)
        # Which split stops the script first depends on the order of a directory listing.
        exact = not (item["error"] or "").startswith("ZeroDivisionError")
        kept = (lambda text: text) if exact else error_type
        report.check(f"pope {name} error", kept(error), kept(item["error"]))
        if score is not None:
            for key in ("mean_f1", "mean_accuracy"):
                report.check(f"pope {name} {key}", score.metrics[key], item[key])
        counts = benchmark.confusions(benchmark.read_answers(answers), data) if item["categories"] else {}
        for category, want in item["categories"].items():
            c = counts[category]
            got: dict[str, Any] = {"samples": c.answers, "TP": c.tp, "FP": c.fp, "TN": c.tn, "FN": c.fn}
            if "f1" in want:
                got |= c.metrics()
                order = ("f1", "accuracy", "precision", "recall", "yes_ratio")
                got["summary_line"] = ", ".join(f"{got[key]:.3f}" for key in order)
            report.check(f"pope {name} {category}", {key: got[key] for key in want}, want)
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))


def mme(report: Report, data: Path, entry: Any) -> None:
    benchmark = MME()
    for text, label in entry["text_to_label_with_trailing_newline"]:
        report.check(f"mme {text!r}", read_label(f"{text}\n"), label)
    for name, item in entry["scores"].items():
        answers = answers_of(data, "MME", name)
        try:
            texts = benchmark.convert(benchmark.read_answers(answers), data)
        except OfficialError as error:
            report.check(f"mme {name} converter error", error.official, item.get("error"))
            continue
        recorded = {p.stem: p.read_bytes().decode("utf-8") for p in sorted((data / item["converted"]).glob("*.txt"))}
        report.check(f"mme {name} converted", texts, recorded)
        score, error = outcome(benchmark, answers, data)
        if (item.get("error") or "").startswith("FileNotFoundError"):
            report.check(f"mme {name} error", error_type(error), error_type(item["error"]))
        else:
            report.check(f"mme {name} error", error, item.get("error"))
        if score is None:
            continue
        for key in ("perception", "cognition"):
            report.check(f"mme {name} {key}", score.metrics[key], item[key])
        for subtask, want in item["per_subtask_detail"].items():
            got = {key: score.metrics["subtasks"][subtask][key] for key in want}
            report.check(f"mme {name} {subtask}", got, want)
        report.check(f"mme {name} printed", mme_text(score.metrics).split(), item["stdout"].split())
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))


def mme_text(metrics: Any) -> str:
    parts = []
    for title in ("Perception", "Cognition"):
        part = metrics[title.lower()]
        parts += [f"=========== {title} ===========", f"total score: {part['total']}"]
        parts += [f"{name} score: {value}" for name, value in part["subtasks"].items()]
    return "\n".join(parts)


def scienceqa(report: Report, data: Path, entry: Any) -> None:
    benchmark = ScienceQA()
    for case in entry["parse_table"]:
        letter = parse_answer(case["text"])
        got = [letter, option_index(letter, 2), option_index(letter, 5)]
        want = [case["parsed"], case["pred_idx_2_choices"], case["pred_idx_5_choices"]]
        report.check(f"scienceqa {case['text']!r}", got, want)
    for name, item in entry["scores"].items():
        answers = answers_of(data, "scienceqa", name)
        score, error = outcome(benchmark, answers, data)
        report.check(f"scienceqa {name} error", error, item.get("error"))
        if score is None:
            continue
        numbers = ("acc", "correct", "count", "img_correct", "img_total", "img_acc")
        got = {key: score.metrics[key] for key in numbers}
        report.check(f"scienceqa {name}", got, {key: item[key] for key in numbers})
        printed = "Total: {count}, Correct: {correct}, Accuracy: {acc:.2f}%, IMG-Accuracy: {img_acc:.2f}%".format(**got)
        report.check(f"scienceqa {name} printed", printed, item["stdout"].strip())
        rows = analyse_official(benchmark, answers, data)
        output: dict[str, list[Any]] = {"correct": [], "incorrect": []}
        for row in rows:
            right = "ABCDE".find(row["ground_truth"]) == row["index"]
            output["correct" if right else "incorrect"].append({k: v for k, v in row.items() if k != "index"})
        report.check(f"scienceqa {name} output", output, load(data, item["output_file"]))
        result = {key: got[key] for key in ("acc", "correct", "count")}
        result |= {"results": {row["question_id"]: row["index"] for row in rows}}
        result |= {"outputs": {row["question_id"]: row["pred"] for row in rows}}
        report.check(f"scienceqa {name} result", result, load(data, item["result_file"]))
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))


def mmbench(report: Report, data: Path, entry: Any, kind: type[MMBench] = MMBench) -> None:
    benchmark = kind()
    for name, item in entry["submission"].items():
        mmbench_submission(report, data, benchmark, answers_of(data, benchmark.name, name), item, name)
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))
    rotating = kind(all_rounds=True)
    rows = Path(entry["prompts_all_rounds"]).stem.removeprefix("prompts_all_rounds")
    rotating.table = f"{Path(kind.table).stem}{rows}.tsv"  # type: ignore[misc]
    records = list(rotating.records(data))
    prompts(report, data, entry["prompts_all_rounds"], rotating, records)
    written = [rotating.answer_record(record, "", "") for record in records]
    keys = ("question_id", "round_id", "prompt", "options", "option_char")
    for answers in (data / EVAL / benchmark.name / "answers").rglob("*_all_rounds.jsonl"):
        recorded = read_jsonl(answers, keys).records
        got = [[row[key] for key in keys] for row in written]
        report.check(f"{benchmark.name} all rounds", got, [[row[key] for key in keys] for row in recorded])


def mmbench_submission(report: Report, data: Path, benchmark: MMBench, answers: Path, item: Any, name: str) -> None:
    import openpyxl

    name = f"{benchmark.name} {name}"
    with tempfile.TemporaryDirectory() as folder:
        benchmark.write_submission(answers, data, Path(folder) / "out.xlsx")
        for path in (Path(folder) / "out.xlsx", data / item["xlsx"]):
            sheet = openpyxl.load_workbook(path)["Sheet1"]
            rows = [list(row) for row in sheet.iter_rows(values_only=True)]
            report.check(
                f"{name} cells of {path.name}", {"columns": rows[0], "rows": rows[1:]}, load(data, item["cells"])
            )
    score = benchmark.score(answers, data, "official")
    circular, categories = score.metrics["circular"], score.metrics["by_category"]
    report.check(f"{name} counts", [len(rows) - 1, score.n_records], [item["n_rows"], item["n_groups"]])
    kit = item["circular_vlmevalkit_exact_matching"]
    abbreviations = score.metrics["abbreviations"]
    by_l2 = {abbreviations.get(k, k): v for k, v in score.metrics["by_l2_category"]["vlmevalkit"].items()}
    splits = score.metrics["by_split"]["vlmevalkit"]
    if len(splits) == 1:
        got = {"split": list(splits), "Overall": [circular["vlmevalkit"]]}
        got |= {key: [value] for key, value in (by_l2 | categories["vlmevalkit"]).items()}
        report.check(f"{name} vlmevalkit report", got, kit["report"])
    else:
        overall = dict(zip(kit["report"]["split"], kit["report"]["Overall"], strict=True))
        report.check(f"{name} vlmevalkit splits", splits, overall)
    hits = {key: int(hit) for key, hit in score.per_record.items()}
    report.check(f"{name} vlmevalkit hits", hits, kit["hit_per_main_index"])
    lmms = item["circular_lmms_eval_static"]
    report.check(f"{name} lmms-eval overall", circular["lmms-eval"], lmms["overall"])
    report.check(f"{name} lmms-eval category", categories["lmms-eval"], lmms["category"])
    report.check(f"{name} lmms-eval l2", score.metrics["by_l2_category"]["lmms-eval"], lmms["l2_category"])
    inferred = inferred_options(benchmark, answers, data)
    for rule, want in (("vlmevalkit", kit), ("lmms-eval", lmms)):
        got = {str(index): letter for index, letter in inferred[rule].items()}
        report.check(f"{name} {rule} options", got, want["inferred_option_per_index"])
    plain = [score.metrics["single_letter"], score.metrics["single_letter_first_pass"], circular["letter"]]
    keys = ("vanilla_exact_letter_all_rows", "vanilla_exact_letter_first_pass_rows", "circular_exact_letter")
    report.check(f"{name} letter", plain, [item["independent"][key] for key in keys])


def mmbench_cn(report: Report, data: Path, entry: Any) -> None:
    mmbench(report, data, entry, MMBenchCN)


def gqa(report: Report, data: Path, entry: Any) -> None:
    benchmark = BENCHMARKS["gqa"]
    questions = load(data, f"{EVAL}/gqa/data/testdev_balanced_questions.json")
    for name, item in entry["scores"].items():
        base, _, variant = name.partition("+")
        answers = answers_of(data, "gqa", base)
        score, error = outcome(benchmark, answers, data, ScoreOptions(consistency=variant == "consistency"))
        report.check(f"gqa {name} error", error, item.get("error"))
        if "predictions" in item:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out.json"
                benchmark.write_submission(answers, data, out)
                report.check(f"gqa {name} predictions", json.loads(out.read_text()), load(data, item["predictions"]))
        if score is None:
            continue
        got = score.metrics
        if variant.startswith("with_"):
            choices = load(data, f"{EVAL}/gqa/{variant}/testdev_balanced_choices.json")
            lines = benchmark.read_answers(answers).records
            predictions = {str(row["question_id"]): gqa_metric.clean_prediction(row["text"]) for row in lines}
            got = gqa_metric.evaluate(questions, predictions, choices)
        for key, want in item["scores"].items():
            report.check(f"gqa {name} {key}", got[key], want)
        printed = gqa_text(got, variant == "consistency")
        report.check(f"gqa {name} printed", printed.split(), item["stdout_tail"].split())
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))
    chunked(report, data, "gqa", entry["num_chunks"], "llava_gqa_testdev_balanced.jsonl")


def gqa_text(scores: Any, with_consistency: bool) -> str:
    names = ["binary", "open", "accuracy", *(["consistency"] if with_consistency else []), "validity", "plausibility"]
    lines = [f"{name.capitalize()}: {scores[name]:.2f}%" for name in names]
    lines.append(f"Distribution: {scores['distribution']:.2f} (lower is better)")
    tables = (
        ("accuracyPerStructuralType", "structural type", str),
        ("accuracyPerSemanticType", "semantic type", str),
        ("accuracyPerSteps", "steps number", int),
        ("accuracyPerLength", "words number", int),
    )
    for key, title, order in tables:
        lines.append(f"Accuracy / {title}:")
        for kind in sorted(scores[key], key=order):
            row = scores[key][kind]
            lines.append(f"{kind}: {row['accuracy']:.2f}% ({row['count']} questions)")
    return "\n".join(lines)


CHECKS = {
    "vqav2": vqav2,
    "vizwiz": vizwiz,
    "textvqa": textvqa,
    "pope": pope,
    "mme": mme,
    "scienceqa": scienceqa,
    "mmbench": mmbench,
    "mmbench_cn": mmbench_cn,
    "gqa": gqa,
    "mmvet": mmvet,
}
