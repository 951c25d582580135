"""The runner with a stand-in for the model: resuming, sharding, locks, broken files, full disks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks import Record, get_benchmark
from evengaze.evaluate.media import open_media
from evengaze.evaluate.predictor import Prediction
from evengaze.evaluate.runner import Answered, Job, Outcome, Work, rank_and_world, run, run_jobs
from evengaze.evaluate.setting import Setting
from evengaze.evaluate.shards import Shard, locked, merge
from evengaze.methods import parse
from runner_fakes import save_pope


class Fake:
    """Answers by a rule, reads pictures as the real one does, and can break down after some batches."""

    def __init__(self, fails_after: int | None = None, error: BaseException | None = None) -> None:
        self.fails_after, self.error, self.asked = fails_after, error, 0

    def describe(self, template: str) -> dict[str, Any]:
        return {"name": "fake", "revision": "1", "prompt": template}

    def geometry(self, records: Sequence[Record], template: str) -> tuple[int, int]:
        return 6, 16

    def answer(self, works: Iterable[Work]) -> Iterator[tuple[int, Answered]]:
        for n, work in enumerate(works):
            if n == self.fails_after:
                assert self.error is not None
                raise self.error
            self.asked += len(work.batch)
            yield work.job, [self._one(record) for record in work.batch]

    def _one(self, record: Record) -> Prediction:
        try:
            open_media(record)
        except DataError as error:
            return Prediction(record, None, {}, str(error))
        trace = {"visual_tokens": 16, "average_tokens": 8.0, "relative_flops": 0.5}
        return Prediction(record, "Yes" if int(record.key) % 3 else "No", trace)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return job_in(tmp_path / "out", save_pope(tmp_path / "data"))


def job_in(folder: Path, data: Path, **changes: Any) -> Job:
    return Job(get_benchmark("pope"), data, parse("fastv:keep=4"), folder, Setting(**{"batch_size": 5, **changes}))


def answers(outcome: Outcome) -> str:
    return (outcome.job.folder / "answers.jsonl").read_text()


def uninterrupted(job: Job, tmp_path: Path) -> str:
    return answers(run(job_in(tmp_path / "reference", job.data), Fake()))


def test_answers_are_llava_records_in_the_order_of_the_dataset(job: Job) -> None:
    outcome = run(job, Fake())
    lines = [json.loads(line) for line in answers(outcome).splitlines()]
    records = list(job.benchmark.records(job.data))
    assert [line["question_id"] for line in lines] == [record.question_id for record in records]
    assert list(lines[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert lines[0]["metadata"] == {"key": "1", "visual_tokens": 16, "average_tokens": 8.0, "relative_flops": 0.5}
    assert outcome.score is not None
    assert outcome.score.n_scored == 12
    assert outcome.means() == {"visual_tokens": 16, "average_tokens": 8.0, "relative_flops": 0.5}


def test_a_finished_run_asks_nothing_again_and_changes_nothing(job: Job) -> None:
    before, again = answers(run(job, Fake())), Fake()
    assert answers(run(job, again)) == before
    assert again.asked == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("killed")])
def test_an_interrupted_run_goes_on_where_it_stopped(job: Job, tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run(job, Fake(fails_after=2, error=error))
    rest = Fake()
    assert answers(run(job, rest)) == uninterrupted(job, tmp_path)
    assert rest.asked == 2


@pytest.mark.parametrize("cut", [1, 2, 40, 150])
def test_a_torn_last_line_is_repaired(job: Job, tmp_path: Path, cut: int) -> None:
    run(job, Fake())
    path = job.folder / "shards" / "answers-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert answers(run(job, Fake())) == uninterrupted(job, tmp_path)


def test_a_damaged_line_inside_is_an_error_that_names_it(job: Job) -> None:
    run(job, Fake())
    path = job.folder / "shards" / "answers-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "garbage\n", *lines[4:]]))
    with pytest.raises(DataError, match=r"answers-0.jsonl line 4.*Delete that line"):
        run(job, Fake())


def test_another_setting_in_the_same_folder_is_refused_with_the_difference(job: Job) -> None:
    run(job, Fake())
    other = Job(job.benchmark, job.data, parse("fastv:keep=6"), job.folder, Setting(batch_size=5, max_new_tokens=7))
    with pytest.raises(DataError) as caught:
        run(other, Fake())
    assert "pruner.keep: 4 -> 6" in str(caught.value)
    assert "generation.max_new_tokens: 128 -> 7" in str(caught.value)
    assert "layer" not in str(caught.value)


def test_another_dataset_in_the_same_folder_is_refused(job: Job, tmp_path: Path) -> None:
    run(job, Fake())
    with pytest.raises(DataError, match=r"benchmark.records: 12 -> 9"):
        run(job_in(job.folder, save_pope(tmp_path / "other", images=3)), Fake())


def test_two_runs_in_one_folder_are_refused(job: Job) -> None:
    with locked(job.folder, 0), pytest.raises(DataError, match="another run is writing"):
        run(job, Fake())
    assert run(job, Fake()).score is not None


def test_what_goes_wrong_while_a_folder_is_locked_is_not_about_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="refused"), locked(tmp_path, 0):
        raise ConnectionError("refused")
    with locked(tmp_path, 0):
        pass


def test_unreadable_pictures_are_listed_and_the_run_goes_on(job: Job) -> None:
    pictures = job.data / "playground/data/eval/pope/val2014"
    empty, gone = pictures / "COCO_val2014_000000000001.jpg", pictures / "COCO_val2014_000000000002.jpg"
    saved = empty.read_bytes(), gone.read_bytes()
    empty.write_bytes(b"")
    gone.unlink()
    outcome = run(job, Fake())
    assert (len(outcome.answers), len(outcome.errors), outcome.waiting) == (6, 6, 0)
    listed = [json.loads(line) for line in (job.folder / "errors.jsonl").read_text().splitlines()]
    assert {entry["question_id"] for entry in listed} == {2, 3, 10000002, 10000003, 20000002, 20000003}
    assert "cannot be read as a picture" in listed[0]["error"]
    assert "does not exist" in listed[1]["error"]
    assert outcome.score is not None
    assert len(outcome.score.problems.missing) == 6
    empty.write_bytes(saved[0])
    gone.write_bytes(saved[1])
    fixed = run(job, Fake())
    assert (len(fixed.answers), len(fixed.errors)) == (12, 0)
    assert (job.folder / "errors.jsonl").read_text() == ""


def test_nothing_is_lost_when_the_disk_is_full(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.write, []

    def full(handle: int, data: bytes) -> int:
        calls.append(handle)
        if len(calls) == 2:
            return real(handle, data[: len(data) // 2])
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr("evengaze.evaluate.shards.os.write", full)
    with pytest.raises(
        DataError, match=r"answers-0.jsonl: the disk is full.*answers written so far are safe.*same command again"
    ):
        run(job, Fake())
    assert len((job.folder / "shards/answers-0.jsonl").read_text().splitlines()) == 5
    monkeypatch.undo()
    assert answers(run(job, Fake())) == uninterrupted(job, tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_file_that_may_not_grow_ends_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "answers-0.jsonl"
    code = f"""
import resource, pathlib
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from evengaze.evaluate.shards import Shard
with Shard(pathlib.Path({str(path)!r})) as shard:
    for n in range(100):
        shard.append([{{"n": n, "text": "x" * 50}}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the disk is full" in done.stderr
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == list(range(14))
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_work_and_merge_to_the_same_file(
    job: Job, tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    outcomes, asked = [], 0
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        fake = Fake()
        outcomes.append(run(job, fake))
        asked += fake.asked
    assert asked == 12
    assert outcomes[0].score is None
    assert outcomes[0].problem is not None
    assert outcomes[-1].score is not None
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert answers(outcomes[-1]) == uninterrupted(job, tmp_path)


def test_a_run_can_go_on_with_another_number_of_ranks(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, Fake(fails_after=1, error=KeyboardInterrupt()))
    for rank in (0, 1):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        outcome = run(job, Fake())
    monkeypatch.undo()
    assert answers(outcome) == uninterrupted(job, tmp_path)


def test_merging_twice_changes_nothing_and_strangers_are_refused(job: Job) -> None:
    before = answers(run(job, Fake()))
    keys = [record.key for record in job.benchmark.records(job.data)]
    merge(job.folder, keys)
    assert (job.folder / "answers.jsonl").read_text() == before
    with pytest.raises(DataError, match="answers to records that the dataset does not have"):
        merge(job.folder, keys[:-1])


def test_rank_and_world_size_must_make_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_and_world() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK=2"):
        rank_and_world()


def test_limit_takes_the_first_records_or_a_random_draw_and_can_be_raised(job: Job, tmp_path: Path) -> None:
    first = run(job_in(tmp_path / "a", job.data, limit=3), Fake())
    assert list(first.answers) == ["1", "2", "3"]
    drawn = run(job_in(tmp_path / "b", job.data, limit=3, shuffle_seed=1), Fake())
    assert len(drawn.answers) == 3
    assert list(drawn.answers) != ["1", "2", "3"]
    assert list(drawn.answers) == list(run(job_in(tmp_path / "c", job.data, limit=3, shuffle_seed=1), Fake()).answers)
    assert answers(run(job_in(tmp_path / "a", job.data), Fake())) == uninterrupted(job, tmp_path)
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        job_in(tmp_path / "d", job.data, limit=0)


def test_missing_files_are_named_before_anything_is_answered(job: Job, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory"):
        run(job_in(tmp_path / "x", tmp_path / "nowhere"), Fake())
    (job.data / "playground/data/eval/pope/llava_pope_test.jsonl").unlink()
    with pytest.raises(DataError, match=r"llava_pope_test\.jsonl"):
        run(job, Fake())


def test_missing_labels_leave_answers_unscored_with_the_reason(job: Job) -> None:
    (job.data / "playground/data/eval/pope/coco/coco_pope_random.json").unlink()
    outcome = run(job, Fake())
    assert len(outcome.answers) == 12
    assert outcome.score is None
    assert "coco_pope_random.json" in str(outcome.problem)


def test_an_append_that_nothing_is_given_to_writes_nothing(tmp_path: Path) -> None:
    with Shard(tmp_path / "s" / "answers-0.jsonl") as shard:
        shard.append([])
    assert (tmp_path / "s" / "answers-0.jsonl").read_bytes() == b""


def test_a_job_that_the_model_cannot_do_is_given_up_and_the_others_go_on(job: Job, tmp_path: Path) -> None:
    class Half(Fake):
        def answer(self, works: Iterable[Work]) -> Iterator[tuple[int, Answered]]:
            for work in works:
                yield (0, "too deep") if work.job == 0 else (1, [self._one(record) for record in work.batch])

    records = list(job.benchmark.records(job.data))
    other = job_in(tmp_path / "other", job.data)
    outcomes = dict(run_jobs([(job, records), (other, records)], Half()))
    assert outcomes[0].failed
    assert outcomes[0].problem == "too deep"
    assert outcomes[1].score is not None


def test_all_folders_are_checked_before_the_first_answer(job: Job, tmp_path: Path) -> None:
    run(job, Fake())
    records = list(job.benchmark.records(job.data))
    fresh, changed = job_in(tmp_path / "fresh", job.data), job_in(job.folder, job.data, max_new_tokens=3)
    fake = Fake()
    with pytest.raises(DataError, match="max_new_tokens"):
        list(run_jobs([(fresh, records), (changed, records)], fake))
    assert fake.asked == 0
    assert run(fresh, fake).score is not None
