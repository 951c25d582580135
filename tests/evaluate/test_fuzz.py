"""Every file that the commands read, damaged in every way: exit status 2 and one line, or success; never a traceback.

More inputs than in a test run: ``EVENGAZE_FUZZ=1000 python -m pytest tests/evaluate/test_fuzz.py -q -s``. At the end it
says what was tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from evengaze.cli import main
from evengaze.debias.curve import Curve
from evengaze.debias.families import Exponential
from evengaze.evaluate.predictor import ModelSpec, Predictor
from runner_fakes import save_model

TRIES = int(os.environ.get("EVENGAZE_FUZZ", "12"))
EVAL = "playground/data/eval"
TRIED: Counter[tuple[str, str]] = Counter()


@dataclass
class Target:
    """A command and the files that it reads.

    Attributes:
        arguments: the command.
        files: those that are damaged, one at a time.
        outputs: folders that are removed after each try.
        originals: what the files hold.
    """

    arguments: list[str]
    files: list[Path]
    outputs: list[Path] = field(default_factory=list)
    originals: dict[Path, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.files
        self.originals = {path: path.read_bytes() for path in self.files}


# -- damage ------------------------------------------------------------------------------------------------------------
_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", "\x00", "\ud800", "[/red]\x1b[2J", "<image>", "../../etc/passwd", "9" * 5000, "a" * 40_000]),
    st.lists(st.none(), max_size=2),
    st.dictionaries(st.sampled_from(["a", "name", "value"]), st.integers(), max_size=2),
)
_BLOBS = (
    b"",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<!doctype html><html>404</html>",
    b"\x80\x04\x95pickle",
    b"\xff\xfe\x00\x00",
    b"[" * 50_000,
    b"{}",
    b"[]",
    b"null",
    b"\n\n",
)


def _paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from _paths(one, (*here, key))


def _put(value: Any, path: tuple[Any, ...], new: Any, *, remove: bool) -> Any:
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if remove and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = _put(copy[path[0]], path[1:], new, remove=remove)
    return copy


def _in_json(data: st.DataObject, raw: bytes) -> bytes | None:
    """Another value in one place of a JSON document or line; None if it is neither."""
    lines = raw.decode("utf-8", "replace").split("\n")
    whole = False
    try:
        json.loads(raw)
        lines, whole = [raw.decode()], True
    except ValueError:
        lines = [line for line in lines if line.strip()]
    try:
        values = [json.loads(line) for line in lines]
    except ValueError:
        return None
    if not values:
        return None
    at = data.draw(st.integers(0, len(values) - 1))
    paths = list(_paths(values[at]))
    path = paths[data.draw(st.integers(0, min(len(paths), 300) - 1))]
    values[at] = _put(values[at], path, data.draw(_ODD), remove=data.draw(st.booleans()))
    if data.draw(st.booleans()) and not whole:
        values.append(values[at])
    return "\n".join(json.dumps(value) for value in values).encode() + (b"" if whole else b"\n")


def damaged(data: st.DataObject, raw: bytes) -> bytes:
    """A file's content, damaged in one of many ways."""
    kind = data.draw(st.sampled_from(["json", "json", "json", "cut", "flip", "insert", "blob", "bom", "random"]))
    if kind == "json":
        changed = _in_json(data, raw)
        if changed is not None:
            return changed
        kind = "flip"
    at = data.draw(st.integers(0, max(0, len(raw) - 1)))
    if kind == "cut":
        return raw[:at]
    if kind == "flip":
        return raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
    if kind == "insert":
        return raw[:at] + data.draw(st.sampled_from([b"\x00", b"\xff", b"\t", b"\n", b'"', b"]", b"- :\n"])) + raw[at:]
    if kind == "bom":
        return b"\xef\xbb\xbf" + raw
    return data.draw(st.sampled_from(_BLOBS) if kind == "blob" else st.binary(max_size=60))


# -- commands ----------------------------------------------------------------------------------------------------------
def attack(name: str, target: Target, capsys: pytest.CaptureFixture[str], tries: int = TRIES) -> None:
    """Run a command on its files, one of which is damaged each time."""
    with contextlib.suppress(SystemExit):
        main(target.arguments)
    said = capsys.readouterr()
    assert "Error: " not in said.err and "Usage: " not in said.err, said.err  # undamaged, it works
    for folder in target.outputs:
        shutil.rmtree(folder, ignore_errors=True)

    @settings(max_examples=tries, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(target.files))
        path.write_bytes(damaged(data, target.originals[path]))
        capsys.readouterr()
        try:
            main(target.arguments)
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            kept = path.read_bytes() if path.exists() else b""
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(target.originals[path])
            for folder in target.outputs:
                shutil.rmtree(folder, ignore_errors=True)
        said = capsys.readouterr()
        assert status in (0, 2, 3), (status, said.err)
        assert "Traceback" not in said.err + said.out
        assert "\x1b[2J" not in said.err + said.out
        if status == 2:
            errors = [line for line in said.err.splitlines() if line.startswith("Error: ")]
            assert len(errors) == 1, (path, kept[:300], said.err)
        TRIED[name, str(status)] += 1

    run()


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    yield
    total = sum(TRIED.values())
    by_status = {status: sum(n for (_, s), n in TRIED.items() if s == status) for status in ("0", "2", "3")}
    print(f"\nfuzz: {total} inputs tried, exit status {by_status}, tracebacks 0; by command:")
    for name in dict.fromkeys(name for name, _ in TRIED):
        print(f"  {name}: " + ", ".join(f"{s}: {TRIED[name, s]}" for s in ("0", "2", "3") if TRIED[name, s]))


def texts(folder: Path) -> list[Path]:
    endings = (".json", ".jsonl", ".tsv", ".txt")
    return sorted(p for p in folder.rglob("*") if p.suffix in endings and "answers" not in p.relative_to(folder).parts)


SCORED = {
    "mme": f"{EVAL}/MME/answers/gold.jsonl",
    "mmbench": f"{EVAL}/mmbench/answers/mmbench_dev_20230712/gold.jsonl",
    "pope": f"{EVAL}/pope/answers/gold.jsonl",
    "textvqa": f"{EVAL}/textvqa/answers/gold.jsonl",
    "scienceqa": f"{EVAL}/scienceqa/answers/gold.jsonl",
    "gqa": f"{EVAL}/gqa/answers/llava_gqa_testdev_balanced/gold/merge.jsonl",
    "mmvet": f"{EVAL}/mm-vet/answers/gold.jsonl",
    "msvd_qa": "eval/GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA/gold/merge.jsonl",
}


@pytest.mark.parametrize("name", SCORED)
def test_score(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    from evengaze.evaluate.benchmarks import get_benchmark

    data = Path(shutil.copytree(golden, tmp_path / "data"))
    root, answers = get_benchmark(name).root(data), data / SCORED[name]
    files = [answers, *texts(root)]
    for mode in ("default", "official"):
        given_ = ["score", name, "--answers", str(answers), "--data", str(data), "--mode", mode, "--json"]
        attack(f"score {name}", Target(given_, files), capsys)


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "mmbench", "gqa", "mmvet"])
def test_submissions(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    from evengaze.evaluate.benchmarks import get_benchmark

    data = Path(shutil.copytree(golden, tmp_path / "data"))
    root = get_benchmark(name).root(data)
    answers = sorted(
        p for p in root.rglob("*.jsonl") if "answers" in p.relative_to(root).parts and "messy" not in p.name
    )[0]
    out = tmp_path / "submission"
    given_ = ["score", name, "--answers", str(answers), "--data", str(data)]
    given_ += ["--submission", str(out / ("s.xlsx" if name == "mmbench" else "s.json"))]
    attack(f"score {name} --submission", Target(given_, [answers, *texts(root)], [out]), capsys)


def test_spreadsheets(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(shutil.copytree(golden, tmp_path / "data"))
    found = next(iter(sorted(data.rglob("*.xlsx"))), None)
    assert found is not None
    name = "mmbench_cn" if "mmbench_cn" in str(found) else "mmbench"
    attack("score xlsx", Target(["score", name, "--answers", str(found), "--data", str(data)], [found]), capsys)


def test_recorded_judgements(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(shutil.copytree(golden, tmp_path / "data"))
    grades = sorted(p for p in data.rglob("*.json") if "grade" in p.name)[0]
    given_ = ["score", "mmvet", "--answers", str(data / SCORED["mmvet"]), "--data", str(data), "--judged", str(grades)]
    attack("score mmvet --judged", Target(given_, [grades]), capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def questions(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    rows, truth = [], []
    for i in range(4):
        Image.new("RGB", (20 + 9 * i, 40), (40 * i, 90, 200)).save(folder / f"images/{i}.png")
        rows.append({"question_id": i, "image": f"{i}.png", "text": f"What is {i}?", "category": "ab"[i % 2]})
        truth.append({"question_id": i, "answer": ["yes", "no"]})
    for name, lines in (("questions", rows), ("answers", truth)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


RECIPE = """
model: demo
benchmarks: [questions]
methods: ["fastv:keep=4"]
debias: [none]
budgets: []
baselines: []
limit: 4
batch_size: 2
max_new_tokens: 2
shuffle_seed: 1
device: cpu
dtype: float32
prompt: chat
"""


@pytest.fixture
def loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    predictor = Predictor.load(ModelSpec(str(model), device="cpu"))
    monkeypatch.setattr(Predictor, "load", classmethod(lambda cls, spec: predictor))
    return predictor


def test_evaluate(loaded: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, recipe, curve = questions(tmp_path / "data"), tmp_path / "recipe.yaml", tmp_path / "curve.json"
    recipe.write_text(RECIPE)
    Curve(Exponential(1.0)).save(curve)
    fresh = ["evaluate", "--data", str(data), "--out", str(tmp_path / "new"), "--recipe", str(recipe)]
    fresh += ["--debias", f"none,{curve}"]
    read = [recipe, curve, data / "questions.jsonl", data / "answers.jsonl", data / "images/0.png"]
    attack("evaluate", Target(fresh, read, [tmp_path / "new"]), capsys)
    again = ["evaluate", "--data", str(data), "--out", str(tmp_path / "kept"), "--recipe", str(recipe)]
    with pytest.raises(SystemExit) as end:
        main(again)
    assert not end.value.code
    kept = sorted(p for p in (tmp_path / "kept").rglob("*.json*") if p.name != "flipped.jsonl")
    attack("evaluate (resumed)", Target(again, kept), capsys)


def test_report(loaded: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, recipe, out = questions(tmp_path / "data"), tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    with pytest.raises(SystemExit):
        main(["evaluate", "--data", str(data), "--out", str(out), "--recipe", str(recipe)])
    given_ = ["report", str(out), "-o", str(tmp_path / "report")]
    read = sorted(p for p in out.rglob("*.json*") if p.name in ("result.json", "answers.jsonl"))
    attack("report", Target(given_, read, [tmp_path / "report"]), capsys, max(4, TRIES // 3))


def test_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        Curve(Exponential(1.0)).save(tmp_path / f"{name}.json")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for arguments in (["show", str(one)], ["compare", str(one), str(two)], ["list", str(tmp_path)]):
        attack(f"curves {arguments[0]}", Target(["curves", *arguments], [one]), capsys)


def test_checkpoints(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, picture = Path(shutil.copytree(model, tmp_path / "model")), tmp_path / "a.png"
    Image.new("RGB", (20, 30)).save(picture)
    given_ = ["run", "--model", str(folder), "--image", str(picture), "--prompt", "What?", "--device", "cpu"]
    given_ += ["--max-new-tokens", "2"]
    read = sorted(p for p in folder.iterdir() if p.is_file())
    attack("run", Target(given_, [*read, picture]), capsys)


@pytest.mark.parametrize("name", ["fingerprint.json", "cache"])
def test_a_judges_cache(tmp_path: Path, name: str) -> None:
    """Not through a command, as that would need a judge."""
    from evengaze.errors import EvengazeError
    from evengaze.evaluate.judge import CachedJudge

    class Dumb:
        def describe(self) -> dict[str, Any]:
            return {}

    line = json.dumps({"key": "k", "turn": "", "reply": "1", "model": "m"}).encode() + b"\n"
    path = tmp_path / name

    @settings(max_examples=TRIES * 4, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        path.write_bytes(damaged(data, line * 3))
        try:
            CachedJudge(Dumb(), path)  # type: ignore[arg-type]
        except EvengazeError as error:
            assert name in str(error)
        TRIED["judge cache", "0"] += 1

    run()


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["meta", "cuda:99", "nope", "cpu:7x", ""])
def test_a_device_that_cannot_compute_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, device: str
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (20, 30)).save(picture)
    with pytest.raises(SystemExit) as end:
        main(["run", "--model", str(model), "--image", str(picture), "--prompt", "?", "--device", device])
    assert end.value.code == 2
    assert "device" in capsys.readouterr().err
