"""Grids: what is laid out, how methods are told apart on the command line, recipes, and the commands themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from evengaze.calibration.observe import image_digest
from evengaze.cli import evaluate as command
from evengaze.debias import Curve, CurveWarning, Debias, Exponential
from evengaze.errors import ConfigError, CurveError, DataError
from evengaze.evaluate.benchmarks import BENCHMARKS, get_benchmark
from evengaze.evaluate.grid import Plan, cells
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.evaluate.recipes import Recipe, names, published
from evengaze.evaluate.results import load, tables
from evengaze.evaluate.runner import Job, LocalBackend, run
from evengaze.evaluate.setting import Setting
from evengaze.methods import parse, split
from evengaze.schedule import Schedule
from runner_fakes import save_model, save_pope


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["none,fastv:keep=128,layer=2"], ("none", "fastv:keep=128,layer=2")),
        (["fastv:keep=128;fastv:keep=64"], ("fastv:keep=128", "fastv:keep=64")),
        (["fastv:keep=4,random:keep=4,seed=1,none"], ("fastv:keep=4", "random:keep=4,seed=1", "none")),
        (["pyramiddrop:keep=[0.3,0.1],layers=[1,3]", "none"], ("pyramiddrop:keep=[0.3,0.1],layers=[1,3]", "none")),
        (["fastv,keep=4"], ("fastv:keep=4",)),
        (["fastv:debias=llava-1.5-7b/fastv,keep=4"], ("fastv:debias=llava-1.5-7b/fastv,keep=4",)),
    ],
)
def test_methods_are_split_where_a_new_one_begins(given: list[str], expected: tuple[str, ...]) -> None:
    assert split(given) == expected


@pytest.mark.parametrize("given", ["keep=4,fastv", "fastv;keep=4"])
def test_a_parameter_needs_a_method(given: str) -> None:
    with pytest.raises(ConfigError, match="without a method before it"):
        split([given])


def test_every_method_has_baselines_at_its_average_tokens() -> None:
    plan = Plan(("none", "fastv:layer=2", "divprune"), ("none", "padding"), (256.0, 192.0))
    found = cells(plan, "pope", 32, 576)
    by_name = {cell.name: cell for cell in found}
    assert [cell.role for cell in found].count("dense") == 1
    methods = [cell for cell in found if cell.role == "method"]
    assert {(cell.pruner.name, cell.debias) for cell in methods} == {
        ("fastv", "none"),
        ("fastv", "padding"),
        ("divprune", "none"),
    }
    for cell in methods:
        assert cell.budget is not None
        assert abs(cell.average - cell.budget) < 1
        assert sorted(by_name[name].pruner.name for name in cell.baselines) == ["random", "uniform"]
        for name in cell.baselines:
            assert abs(Schedule.of(by_name[name].pruner, 32, 576).average - cell.average) < 1


def test_combinations_without_sense_are_left_out_with_the_reason() -> None:
    skipped: list[str] = []
    plan = Plan(("random:keep=64", "illava:keep=64"), ("none", "padding", "preset"))
    found = cells(plan, "pope", 32, 576, skipped)
    assert {(cell.pruner.name, cell.debias) for cell in found if cell.role == "method"} == {
        ("random", "none"),
        ("illava", "none"),
        ("illava", "padding"),
    }
    assert any("does not rank by attention" in line for line in skipped)
    assert any("no curve has been published" in line for line in skipped)


def test_presets_curve_files_and_published_curves(tmp_path: Path) -> None:
    Curve(Exponential(1.0)).save(tmp_path / "mine.json")
    plan = Plan(("himap",), ("preset", "published", str(tmp_path / "mine.json")), baselines=())
    by_label = {cell.debias: cell.pruner.debias for cell in cells(plan, "pope", 32, 576)}
    trends = [by_label[label].trend for label in plan.debias]  # type: ignore[union-attr]
    assert len(set(map(repr, trends))) == 3
    with pytest.raises(CurveError, match=r"gone\.json"):
        cells(Plan(("fastv",), ("gone.json",)), "pope", 32, 576)


def test_a_budget_out_of_reach_is_an_error() -> None:
    with pytest.raises(ConfigError, match="prune at an earlier layer"):
        cells(Plan(("fastv:layer=16",), budgets=(32.0,)), "pope", 32, 576)


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_can_be_laid_out(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.description
    layers, visual = (32, 2048) if "video" in name else (10, 196) if name == "demo" else (32, 576)
    for benchmark in recipe.benchmarks:
        assert benchmark in BENCHMARKS
        found = cells(recipe.plan, benchmark, layers, visual)
        assert len(found) > len(recipe.plan.methods)


def test_recipes_with_mistakes_are_refused(tmp_path: Path) -> None:
    for text, message in (
        ("modle: demo", "unknown option modle"),
        ("benchmarks: pope", "must be a list"),
        ("- a", "must hold options"),
        ("a: [", "no valid YAML"),
        ("prompt: loud", "prompt must be"),
        ("budgets: [few]", "must be numbers"),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Recipe.load(str(path))
    with pytest.raises(ConfigError, match="does not exist"):
        Recipe.load("gone.yaml")
    with pytest.raises(ConfigError, match="demo"):
        Recipe.load("gone")


def test_published_figures_name_their_sources_and_known_benchmarks() -> None:
    values = published()
    for entry in values["rows"]:
        assert entry["source"] in values["sources"]
        assert set(entry["values"]) <= set(BENCHMARKS)
        assert set(entry.get("disputed", {})) <= set(entry["values"])
    assert all(isinstance(source["second_hand"], bool) for source in values["sources"].values())


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grid")
    save_pope(root / "data")
    save_model(root / "model")
    return root


def call(*arguments: str) -> Any:
    app = typer.Typer()
    command.register(app)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def options(place: Path, out: Path, *more: str) -> list[str]:
    given = ["evaluate", "--model", str(place / "model"), "--benchmarks", "pope", "--data", str(place / "data")]
    return [*given, "--out", str(out), "--max-new-tokens", "2", "--device", "cpu", *more]


def test_one_command_makes_the_grid_and_the_report(place: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report"
    arguments = options(place, out, "--methods", "none,fastv:keep=4,layer=2", "--debias", "none,padding,preset")
    made = call(*arguments)
    assert made.exit_code == 0, (made.output, made.exception)
    (table,) = tables(load(out), resamples=200)
    assert [row.title for row in table.rows] == [
        "dense",
        "fastv:keep=4",
        "fastv:keep=4 + padding",
        "fastv:keep=4 + preset",
        "random:keep=4",
        "uniform:keep=4",
    ]
    assert table.rows[2].against_plain is not None
    assert set(table.rows[2].against_baselines) == {"random", "uniform"}
    assert "calibrated elsewhere" in made.output
    assert call("report", str(out), "-o", str(report)).exit_code == 0
    html, markdown = (report / "report.html").read_text(), (report / "report.md").read_text()
    for text in (html, markdown):
        assert "fastv:keep=4 + padding" in text
        assert "calibrated elsewhere" in text
        assert "No published figures are known for this architecture (llava/llama/6x64)" in text
        assert '"transformers"' in text or "&#34;transformers&#34;" in text
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert 'src="data:image/svg+xml;base64,' in html
    assert (report / "curves.png").stat().st_size > 1000 < (report / "curves.svg").stat().st_size


def test_a_curve_that_knows_the_benchmarks_pictures_is_flagged(place: Path, tmp_path: Path) -> None:
    pictures = sorted((place / "data/playground/data/eval/pope/val2014").iterdir())
    others = Curve(Exponential(1.0), images=(image_digest(Image.new("RGB", (40, 60))),))
    others.save(tmp_path / "others.json")
    Curve(Exponential(1.0), images=(image_digest(Image.open(pictures[1])),)).save(tmp_path / "same.json")
    labels = ",".join(str(tmp_path / f"{name}.json") for name in ("others", "same"))
    arguments = options(
        place, tmp_path / "out", "--methods", "fastv:keep=4", "--debias", f"padding,{labels}", "--baselines", ""
    )
    for _ in range(2):  # the second run only reads what the first has written
        made = call(*arguments)
        assert made.exit_code == 0, (made.output, made.exception)
        (table,) = tables(load(tmp_path / "out"), resamples=50)
        found = {row.title.rpartition(" ")[2]: row.result.overlap for row in table.rows}
        assert found == {"dense": 0, "padding": 0, "others": 0, "same": 3}
        assert " ".join(made.output.split()).count("3 of 12 answers are about pictures") == 1
        assert "the score is too kind" in " ".join(made.output.split())
    backend = LocalBackend(Predictor.load(ModelSpec(str(place / "model"), device="cpu")))
    pruner = parse("fastv:keep=4").replace(debias=Debias.load(tmp_path / "same.json"))
    job = Job(get_benchmark("pope"), place / "data", pruner, tmp_path / "one", Setting(max_new_tokens=2))
    with pytest.warns(CurveWarning, match="3 of 12"):
        assert run(job, backend).overlap == 3


def test_unreadable_pictures_show_in_the_exit_status(tmp_path: Path, place: Path) -> None:
    data = save_pope(tmp_path / "data", images=2)
    (data / "playground/data/eval/pope/val2014/COCO_val2014_000000000000.jpg").write_bytes(b"")
    made = call(*options(place, tmp_path / "out", "--data", str(data)))
    assert made.exit_code == command.RECORDS_LOST
    assert "3 record(s) could not be read" in made.output


def test_a_recipe_gives_options_and_options_win(place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("benchmarks: [gqa]\nmethods: [none, 'fastv:keep=4']\nbaselines: []\nlimit: 2\n")
    made = call(*options(place, tmp_path / "out", "--recipe", str(recipe)))
    assert made.exit_code == 0, (made.output, made.exception)
    assert len(load(tmp_path / "out")) == 2
    assert all(row.result.answered == 2 for row in load(tmp_path / "out"))


def test_ctrl_c_says_how_to_go_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("evengaze.evaluate.predictor.Predictor.answer", interrupted)
    made = call(*options(place, tmp_path / "out"))
    assert made.exit_code == command.INTERRUPTED
    assert "give the same command again" in " ".join(made.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--benchmarks", "nope"), "no benchmark 'nope'"),
        (("--methods", "fastw"), "unknown method 'fastw'"),
        (("--budgets", "a,b"), "--budgets"),
        (("--data", "nowhere"), "nowhere is not a directory"),
        (("--debias", "gone.json", "--methods", "fastv"), "gone.json does not exist"),
        (("--methods", "fastv:layer=9"), "layer=9 is outside the model"),
    ],
)
def test_mistakes_are_found_before_anything_is_answered(
    place: Path, tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    base = options(place, tmp_path / "out")
    if changes[0] == "--benchmarks":
        base = [a for a in base if a not in ("--benchmarks", "pope")]
    made = call(*base, *changes)
    assert isinstance(made.exception, (ConfigError, DataError, CurveError))
    assert message in str(made.exception)
    assert not list(tmp_path.rglob("answers-*.jsonl"))


def test_options_that_are_missing_are_named() -> None:
    made = call("evaluate", "--model", "x")
    assert "--data, --out, --benchmarks" in str(made.exception)


def test_a_folder_without_results_or_with_broken_ones(tmp_path: Path) -> None:
    assert "holds no result.json" in str(call("report", str(tmp_path)).exception)
    assert "is not a directory" in str(call("report", str(tmp_path / "x")).exception)
    (tmp_path / "result.json").write_text("{")
    assert "cannot be read" in str(call("report", str(tmp_path)).exception)
    (tmp_path / "result.json").write_text("{}")
    assert "result schema None" in str(call("report", str(tmp_path)).exception)


# -- the report, on made-up results ------------------------------------------------------------------------------------


def made_up(folder: Path, benchmark: str, method: str, debias: str, value: float, role: str = "method") -> None:
    about = BENCHMARKS[benchmark]
    credit = {str(i): float(i % 100 < value) for i in range(200)}
    result = {
        "evengaze_result": 1,
        "benchmark": {"name": benchmark, "title": about.title, "split": about.split, "metric": about.metric},
        "cell": {
            "name": f"{method}+{debias}",
            "role": role,
            "method": method,
            "family": method.partition(":")[0],
            "debias": debias,
            "average_planned": 156.0,
            "budget": None,
            "baselines": [],
        },
        "fingerprint": {"model": {"name": "llava-1.5-7b-hf", "architecture": "llava/llama/32x4096"}},
        "tokens": {"visual_tokens": 576, "average_tokens": 156.0, "relative_flops": 0.4},
        "answered": 200,
        "errors": {"7": "x.jpg does not exist"} if debias == "preset" else {},
        "waiting": 0,
        "failed": False,
        "score": {"value": value, "per_record": credit, "n_scored": 200, "n_records": 200, "notes": []},
        "problem": None,
        "notes": [],
    }
    path = folder / benchmark / f"{method}{debias}".replace(":", "-")
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result))


def test_the_report_sets_published_figures_beside_measured_ones(tmp_path: Path) -> None:
    for n, benchmark in enumerate(("pope", "textvqa", "gqa", "mme")):
        made_up(tmp_path / "r", benchmark, "dense", "none", 80.0 - n, "dense")
        for family in ("fastv", "himap"):
            made_up(tmp_path / "r", benchmark, f"{family}:keep=128", "none", 60.0 - n)
            made_up(tmp_path / "r", benchmark, f"{family}:keep=128", "preset", 66.0 - n)
    made = call("report", str(tmp_path / "r"), "-o", str(tmp_path / "out"))
    assert made.exit_code == 0, made.exception
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| fastv | 128 | 49.6 | 50.6 | 59.6 | 1490 |" in " ".join(markdown.split())
    assert "(second-hand)" in markdown
    assert "| `fastv:keep=128 + preset` | 156.0 |" in markdown
    assert "+6.0" in markdown
    assert "x.jpg does not exist" in markdown
    assert (tmp_path / "out" / "radar.png").is_file()
    assert (tmp_path / "out" / "radar.svg").is_file()
    plain = call("report", str(tmp_path / "r"), "-o", str(tmp_path / "bare"), "--no-published")
    assert plain.exit_code == 0
    assert "second-hand" not in (tmp_path / "bare" / "report.md").read_text()
    again = call("report", str(tmp_path / "r"), "-o", str(tmp_path / "again"))
    assert again.exit_code == 0
    for name in ("report.html", "report.md", "curves.svg", "curves.pdf", "radar.svg", "radar.pdf"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_neither_page_lets_results_write_html_or_break_a_table(tmp_path: Path) -> None:
    made_up(tmp_path / "r", "pope", "dense", "none", 80.0, "dense")
    made_up(tmp_path / "r", "pope", "fastv:keep=4", "none", 60.0)
    made_up(tmp_path / "r", "pope", "fastv:keep=4", "preset", 66.0)
    attack = "<script>alert(1)</script> a|b `c` [x](javascript:y)\n# head"
    for path in (tmp_path / "r").rglob("result.json"):
        result = json.loads(path.read_text())
        result["notes"] = [attack]
        result["benchmark"]["title"] = f"POPE {attack}"
        result["cell"]["debias"] = attack if result["cell"]["debias"] == "preset" else "none"
        result["fingerprint"]["model"]["name"] = attack
        path.write_text(json.dumps(result))
    assert call("report", str(tmp_path / "r"), "-o", str(tmp_path / "out")).exit_code == 0
    html, markdown = ((tmp_path / f"out/report.{kind}").read_text() for kind in ("html", "md"))
    assert "<script>" not in html
    outside = "\n".join(re.split(r"```json\n.*?\n```", markdown, flags=re.DOTALL))  # a fence shows HTML as text
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)  # so does a code span
    assert "<script>" not in outside
    assert "](javascript" not in outside
    assert "\n# head" not in markdown
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")]
    assert set(bars[:5]) == {4}  # the overview: head, rule and three methods
