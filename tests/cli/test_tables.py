"""Tables fit the screen, and whatever its width, no name is cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import typer

import evengaze
import evengaze.cli
from evengaze.cli import main, tables, terminal

NAME = "pyramiddrop:keep=[0.5,0.25,0.125],layers=[2,10,20],mode=official"


@pytest.mark.parametrize("limit", [44, 60, 80, 120, 300])
def test_names_are_whole_and_lines_no_longer_than_the_screen(limit: int) -> None:
    columns = [tables.name("method"), tables.Column("average tokens"), tables.Column("time"), tables.text("about")]
    words = "one two three four five six seven eight nine ten"
    rows = [["fastv", "1.0", "100%", words], [NAME, "123.4", tables.together("3% [1%, 5%]"), words]]
    text = tables.table(columns, rows, title="a title " * 12, limit=limit)
    lines = text.splitlines()
    assert sum(line.startswith("fastv") for line in lines) == 1 and sum(NAME in line for line in lines) == 1
    assert all(len(line) <= limit or line == NAME for line in lines)
    assert " ".join(text.split()).count("five") == 2 and "3% [1%, 5%]" in text and "\u2026" not in text


def test_a_table_that_fits_has_one_line_a_row() -> None:
    text = tables.table([tables.name("a"), tables.Column("b")], [["x", "1"], [], ["yy", "22"]], limit=80)
    assert text.splitlines() == ["a    b", "------", "x    1", "", "yy  22"]


def test_a_column_without_any_text() -> None:
    text = tables.table([tables.name("a"), tables.Column(""), tables.Column("b")], [["x", "", "1"]], limit=80)
    assert [line.split() for line in text.splitlines()][::2] == [["a", "b"], ["x", "1"]]
    assert tables.table([tables.name("a"), tables.Column("b")], [], limit=80).startswith("a")


def test_pairs_and_lines_break_at_blanks_only() -> None:
    text = tables.pairs([("keep", "a long explanation " * 5), ("layer", NAME)], limit=50)
    assert NAME in text and all(len(line) <= 50 or NAME in line for line in text.splitlines())
    command = "  evengaze calibrate " + "x" * 90
    assert tables.lines(["word " * 20, command], limit=40)[-1] == command


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("command", ["presets", "methods", "models", "benchmarks"])
def test_lists_at_any_width(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evengaze.debias import preset_names
    from evengaze.methods import names
    from evengaze.models import BUILT_IN

    out = shown(capsys, monkeypatch, width, "list", command)
    from evengaze.evaluate.benchmarks import BENCHMARKS

    out = out if command != "benchmarks" else out.partition("\n\n")[0]
    known = {"benchmarks": tuple(BENCHMARKS), "presets": preset_names(), "methods": names(), "models": tuple(BUILT_IN)}[
        command
    ]
    firsts = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert not set(known) - firsts
    assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize("width", [44, 80])
def test_where_to_get_files_can_be_copied(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evengaze.evaluate.scoring import list_benchmarks

    out = shown(capsys, monkeypatch, width, "list", "benchmarks")
    sources = {word for item in list_benchmarks() for file in item["files"] for word in file["source"].split()}
    assert sources <= set(out.split())
    assert all(len(line) <= width or len(line.split()) == 1 or "(to" in line for line in out.splitlines())


def test_what_a_screen_prints_is_broken_at_blanks_only(capsys: pytest.CaptureFixture[str]) -> None:
    path, words = "/folder/" + "x" * 90, "one two three four five six seven eight nine ten eleven twelve"
    for say in (lambda s: s.print(f"{words} {path}"), lambda s: s.labelled("one", f" two {words} {path}", "bold")):
        say(terminal.Screen(width=60))
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == path and all(len(line) <= 60 for line in lines[:-1]) and len(lines) == 3


def test_presets_say_how_many_were_published(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shown(capsys, monkeypatch, 80, "list", "presets")
    assert out.startswith("41 curves published") and out.count("2508.17807") == 1


def test_what_dataclass_writes_is_no_description() -> None:
    from evengaze.methods.explain import about

    @dataclasses.dataclass(frozen=True)
    class Silent(evengaze.OneStage):
        name = "silent"

    assert about(Silent) == "" and about(evengaze.FastV).startswith("Keep the visual tokens")


def test_methods_explain_their_parameters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from evengaze.methods import get, names
    from evengaze.methods.explain import parameters

    for name in names():
        assert not [one.name for one in parameters(get(name)) if not one.about], name
    out = shown(capsys, monkeypatch, 80, "list", "methods", "fastv")
    text = " ".join(out.split())
    assert "keep visual tokens to keep: a number, or a fraction in (0, 1] (default 128)" in text
    assert 'mode "corrected" (default) or "official"' in text


@pytest.mark.parametrize("width", [60, 80])
def test_plan_at_any_width(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(capsys, monkeypatch, width, "plan", "-m", NAME, "-m", "fastv:keep=12.5%")
    assert NAME in out and "576 -> 72 at layer 2" in " ".join(out.split())
    assert all(len(line) <= width or line == NAME for line in out.splitlines())


def test_rows_that_continue_a_group_take_no_line_for_its_name() -> None:
    columns = [tables.name("group"), tables.name("row"), tables.Column("value")]
    rows = [["a" * 20, "one", "1"], ["", "two", "2"], [], ["b", "three", "3"]]
    made = tables.table(columns, rows, limit=24).splitlines()
    assert made[made.index("a" * 20) :] == ["a" * 20, "  one        1", "  two        2", "", "b", "  three      3"]


def commands() -> list[list[str]]:
    app = typer.main.get_command(evengaze.cli.build())
    found: list[list[str]] = [[]]
    for name, one in app.commands.items():  # type: ignore[attr-defined]
        found += [[name], *([name, inner] for inner in getattr(one, "commands", ()))]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_is_never_cut(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shown(capsys, monkeypatch, 80, *command, "--help")
    assert "Usage" in out and "\u2026" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_no_command_prints_a_table_of_another_kind() -> None:
    folder = Path(evengaze.cli.__file__).parent
    assert not [path.name for path in folder.glob("*.py") if "rich.table" in path.read_text(encoding="utf-8")]
