"""What comes from outside can neither format nor control the terminal."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from rich.table import Table

import evengaze.cli
from evengaze.cli import main, terminal

HOSTILE = "[/red]a[bold]\x1b[31m\x1b]0;title\x07\x9b2J\udc80\u202e:smile:"
SHOWN = r"[/red]a[bold]\x1b[31m\x1b]0;title\x07\x9b2J\udc80\u202e:smile:"


def test_every_way_of_printing_spells_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    screen = terminal.Screen(width=200)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    for print_it in (
        lambda: terminal.echo(HOSTILE),
        lambda: terminal.secho(HOSTILE, fg="red"),
        lambda: screen.print(HOSTILE),
        lambda: screen.print(HOSTILE, style="yellow"),
        lambda: screen.labelled(HOSTILE, HOSTILE, "yellow"),
        lambda: screen.print(table),
    ):
        print_it()
        printed = capsys.readouterr().out
        assert SHOWN in printed
        assert not set(printed) & set("\x1b\x07\x9b\u202e")


def test_json_stays_the_same_value_without_control_characters() -> None:
    text = terminal.as_json({HOSTILE: "犬\x85"})
    assert json.loads(text) == {HOSTILE: "犬\x85"}
    assert "犬" in text
    assert not set(text) & set("\x1b\x07\x85\x9b\u202e")


def test_no_command_prints_in_another_way() -> None:
    """The kind of the fault: a call that bypasses the one place."""
    for path in Path(evengaze.cli.__file__).parent.glob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("print", "typer.echo", "typer.secho", "click.echo", "Console", "sys.stdout.write"), (
                f"{path.name} line {node.lineno}"  # type: ignore[attr-defined]
            )


def test_hostile_ids_and_paths_of_a_scored_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[red]\x1b[2J"
    (folder / "images").mkdir(parents=True)
    rows = [{"question_id": i, "image": "a.png", "text": "?"} for i in ("[/nope]", "\x1b[31m", "b")]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth = [{"question_id": row["question_id"], "answer": "yes"} for row in rows]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truth))
    given = [{"question_id": i, "text": "[/x]\x1b]0;x\x07"} for i in ("b", "[/other]\x9b")]
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    for more in ([], ["--json"]):
        try:
            main(["score", "questions", "--answers", str(folder / "given.jsonl"), "--data", str(folder), *more])
        except SystemExit as end:
            assert end.code in (0, 3)
        printed = "".join(capsys.readouterr())
        assert not set(printed) & set("\x1b\x07\x9b")
        assert "[/nope]" in printed
    with pytest.raises(SystemExit) as end:
        main(["score", "questions", "--answers", str(folder / "gone.jsonl"), "--data", str(folder)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert r"[red]\x1b[2J" in error and "\x1b" not in error
