"""Bad datasets and bad predictions: a clear error that names the file and the fix, or a named count; never a 0."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks import BENCHMARKS, get_benchmark
from evengaze.evaluate.benchmarks.mmbench import options_of, read_tsv
from evengaze.evaluate.jsonl import append_line, read_answers, repair_tail
from evengaze.evaluate.scoring import list_benchmarks, score_file

EVAL = "playground/data/eval"


@pytest.fixture
def data(golden: Path, tmp_path: Path) -> Path:
    """A copy of the datasets that a test may damage."""
    shutil.copytree(golden, tmp_path / "data")
    return tmp_path / "data"


def edit(source: Path, target: Path, change: Callable[[list[str]], list[str]]) -> Path:
    target.write_text("".join(change(source.read_text().splitlines(keepends=True))))
    return target


# -- datasets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_wrong_directory_names_it_and_what_it_should_hold(name: str, tmp_path: Path) -> None:
    benchmark = get_benchmark(name)
    with pytest.raises(DataError, match=str(tmp_path)) as caught:
        list(benchmark.records(tmp_path))
    assert benchmark.location in str(caught.value)
    with pytest.raises(DataError, match="not a directory"):
        list(benchmark.records(tmp_path / "nowhere"))


@pytest.mark.parametrize("depth", ["", "playground/data", EVAL, f"{EVAL}/pope"])
def test_data_may_be_any_folder_on_the_way(golden: Path, depth: str) -> None:
    assert get_benchmark("pope").root(golden / depth).name == "pope"


def test_missing_files_are_all_named_with_their_source(data: Path) -> None:
    for name in ("random", "popular"):
        (data / EVAL / f"pope/coco/coco_pope_{name}.json").unlink()
    with pytest.raises(DataError) as caught:
        score_file("pope", data / EVAL / "pope/answers/gold.jsonl", data)
    message = str(caught.value)
    assert "coco_pope_random.json" in message and "coco_pope_popular.json" in message
    assert "https://github.com/AoiDragon/POPE" in message


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gqa", "gqa/data/testdev_balanced_questions.json"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json"),
        ("scienceqa", "scienceqa/problems.json"),
        ("mmvet", "mm-vet/mm-vet.json"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv"),
    ],
)
def test_half_a_download_is_an_error_that_names_the_file(data: Path, name: str, path: str) -> None:
    target = data / EVAL / path
    raw = target.read_bytes()
    target.write_bytes(raw[: len(raw) // 2])
    answers = next(p for p in (target.parent, target.parent.parent) if (p / "answers").is_dir()) / "answers"
    with pytest.raises(DataError, match="cut off") as caught:
        score_file(name, next(answers.rglob("gold.jsonl"), None) or next(answers.rglob("gold/merge.jsonl")), data)
    assert target.name in str(caught.value)
    assert "http" in str(caught.value)


def test_half_a_question_file_names_the_line(data: Path) -> None:
    target = data / EVAL / "vizwiz/llava_test.jsonl"
    raw = target.read_bytes()
    target.write_bytes(raw[: len(raw) // 2 - 5])
    with pytest.raises(DataError, match=r"llava_test\.jsonl line \d+: not JSON"):
        list(get_benchmark("vizwiz").records(data))


def test_absent_images_are_counted_and_named(data: Path) -> None:
    image = data / EVAL / "pope/val2014/COCO_val2014_000000310196.jpg"
    image.unlink()
    assert get_benchmark("pope").missing_media(data) == [str(image)]
    info = next(item for item in list_benchmarks(data) if item["name"] == "pope")
    assert info["missing"] == [] and info["can_run"] and info["missing_media"] == 1


def test_listing_names_missing_files_and_sources(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / EVAL / "gqa/data/images")
    info = next(item for item in list_benchmarks(data) if item["name"] == "gqa")
    assert info["missing"] == ["data/images"] and info["can_score"] and not info["can_run"]
    nothing = list_benchmarks(tmp_path / "data/expected")
    assert all(item["missing"] and not item["can_run"] for item in nothing)
    assert all(entry["source"] for item in list_benchmarks() for entry in item["files"])


def test_options_end_at_a_cell_that_pandas_reads_as_missing(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    cells = "\t".join
    table.write_text(
        cells(["index", "question", "hint", "A", "B", "C", "D", "answer"])
        + "\n"
        + cells(["1", "q", "", "x", "N/A", "y", "z", "A"])
        + "\n"
        + cells(["2", "q", "NA", "x", "NONE", "y", "z", "A"])
        + "\n"
        + cells(["3", '"a ""quoted""\nquestion"', "h", "w", "x", "y", "z", "A"])
        + "\n"
    )
    rows = read_tsv(table)
    assert [options_of(row) for row in rows] == [["x"], ["x"], ["w", "x", "y", "z"]]
    assert rows[1]["hint"] is None and rows[2]["question"] == 'a "quoted"\nquestion'


def test_a_dataset_of_another_size_than_published_is_noted(golden: Path) -> None:
    score = score_file("pope", golden / EVAL / "pope/answers/gold.jsonl", golden)
    assert any("64 records here, 8910 as published" in note for note in score.notes)


def test_broken_base64_image_names_the_row(data: Path) -> None:
    target = data / EVAL / "mmbench/mmbench_dev_20230712.tsv"
    target.write_text(target.read_text().replace("/9j/4AAQ", "*not base64*", 1))
    with pytest.raises(DataError, match="not base64"):
        list(get_benchmark("mmbench").records(data))


def test_strangers_beside_the_data_do_not_matter(data: Path) -> None:
    (data / EVAL / "pope/coco/.DS_Store").write_text("")
    assert score_file("pope", data / EVAL / "pope/answers/gold.jsonl", data).complete


def test_mme_question_file_with_a_broken_line_names_it(data: Path) -> None:
    target = data / EVAL / "MME/MME_Benchmark_release_version/color/0001.txt"
    target.write_text("Is it red? Please answer yes or no. Yes\n")
    with pytest.raises(DataError, match=r"0001\.txt line 1 has 1 tab-separated"):
        score_file("mme", data / EVAL / "MME/answers/gold.jsonl", data)


def test_test_annotations_without_answers(data: Path) -> None:
    target = data / EVAL / "textvqa/TextVQA_0.5.1_val.json"
    content = json.loads(target.read_text())
    for entry in content["data"]:
        del entry["answers"]
    target.write_text(json.dumps(content))
    with pytest.raises(DataError, match="test annotations have no answers"):
        score_file("textvqa", data / EVAL / "textvqa/answers/gold.jsonl", data)


def test_an_entry_without_a_field_is_no_traceback(data: Path) -> None:
    target = data / EVAL / "gqa/data/testdev_balanced_questions.json"
    content = json.loads(target.read_text())
    del next(iter(content.values()))["types"]
    target.write_text(json.dumps(content))
    answers = next((data / EVAL / "gqa/answers").rglob("gold/merge.jsonl"))
    with pytest.raises(DataError, match=r"testdev_balanced_questions\.json"):
        score_file("gqa", answers, data)


# -- predictions -------------------------------------------------------------------------------------------------------


def test_no_such_file_and_empty_file(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        score_file("pope", tmp_path / "none.jsonl", golden)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no prediction"):
        score_file("pope", tmp_path / "empty.jsonl", golden)


def test_unknown_benchmark_lists_the_known_ones(golden: Path) -> None:
    with pytest.raises(ConfigError, match="textvqa"):
        score_file("imagenet", golden, golden)
    assert get_benchmark("MM-Vet").name == "mmvet" and get_benchmark("MMBench-CN").name == "mmbench_cn"


@pytest.mark.parametrize("other", ["gqa", "textvqa", "scienceqa"])
def test_predictions_of_another_benchmark(golden: Path, other: str) -> None:
    answers = next((golden / EVAL / other / "answers").rglob("*.jsonl"))
    with pytest.raises(DataError, match="answers of another"):
        score_file("pope", answers, golden)


def test_predictions_of_another_split_with_the_same_ids(golden: Path, tmp_path: Path) -> None:
    """VizWiz ids are positions, so only the questions tell splits apart."""
    source = golden / EVAL / "vizwiz/answers/gold.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        row["prompt"] = "What does this say then?\nAnswer the question using a single word or phrase."
    answers = tmp_path / "val.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="another split"):
        score_file("vizwiz", answers, golden)


def test_malformed_duplicate_unknown_and_missing_are_named(golden: Path, tmp_path: Path) -> None:
    def change(lines: list[str]) -> list[str]:
        stranger = json.dumps({"question_id": 999, "prompt": "Is there?", "text": "yes"})
        return [
            *lines[2:],
            "not json\n",
            "\n",
            '{"question_id": 3}\n',
            "[1, 2]\n",
            '{"question_id": 5, "text": null}\n',
            '{"question_id": true, "text": "yes"}\n',
            f"{stranger}\n",
            lines[3],
        ]

    answers = edit(golden / EVAL / "pope/answers/gold.jsonl", tmp_path / "a.jsonl", change)
    score = score_file("pope", answers, golden)
    removed = [
        json.loads(line)["question_id"]
        for line in (golden / EVAL / "pope/answers/gold.jsonl").read_text().splitlines()[:2]
    ]
    assert score.problems.missing == [str(i) for i in removed]
    assert len(score.problems.duplicate) == 1
    assert score.problems.unknown == ["999"]
    reasons = [item["reason"] for item in score.problems.malformed]
    assert [item["line"] for item in score.problems.malformed] == list(range(63, 69))
    assert "not JSON" in reasons[0] and reasons[1] == "blank line" and reasons[2] == "without text"
    assert "list" in reasons[3] and "NoneType" in reasons[4] and "bool" in reasons[5]
    assert not score.complete and score.n_scored == 62
    assert score.to_dict()["counts"] == {"missing": 2, "duplicate": 1, "unknown": 1, "malformed": 6, "errors": 0}
    json.dumps(score.to_dict(), allow_nan=False)


def test_torn_last_line_is_seen_and_can_be_cut_off(golden: Path, tmp_path: Path) -> None:
    answers = tmp_path / "a.jsonl"
    raw = (golden / EVAL / "pope/answers/gold.jsonl").read_bytes()
    answers.write_bytes(raw[:-30])
    assert read_answers(answers).torn
    score = score_file("pope", answers, golden)
    assert len(score.problems.missing) == 1 and len(score.problems.malformed) == 1
    cut = repair_tail(answers)
    assert cut and raw.startswith(answers.read_bytes() + cut)
    lines = read_answers(answers)
    assert not lines.torn and not lines.malformed and len(lines.records) == 63


def test_repair_keeps_a_complete_line_without_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert repair_tail(path) == b""
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    assert repair_tail(tmp_path / "none") == b""


def test_line_separators_inside_strings_do_not_split_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        '{"question_id": 1, "text": "a\u2028b\u0085c"}\r\n'.encode() + b'{"question_id": 2, "text": "\xff"}\n'
    )
    lines = read_answers(path)
    assert [row["text"] for row in lines.records] == ["a\u2028b\u0085c"]
    assert [item.reason for item in lines.malformed] == ["not UTF-8"]


def test_full_disk_is_a_clear_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(DataError, match="Free disk space"):
        append_line(full, {"a": 1})


def test_a_benchmark_without_server_has_no_submission(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no submission format"):
        score_file("textvqa", golden / EVAL / "textvqa/answers/gold.jsonl", golden, submission=tmp_path / "out.json")


def test_gqa_predictions_without_a_balanced_question(data: Path, tmp_path: Path) -> None:
    target = data / EVAL / "gqa/data/testdev_balanced_questions.json"
    content = json.loads(target.read_text())
    for question in content.values():
        question["isBalanced"] = False
    target.write_text(json.dumps(content))
    answers = next((data / EVAL / "gqa/answers").rglob("gold/merge.jsonl"))
    with pytest.raises(DataError, match="no balanced question"):
        score_file("gqa", answers, data)
