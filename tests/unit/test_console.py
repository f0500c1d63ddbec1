"""What the command line shows of what devices say."""

import pytest

from hedgerow_cloud.cli import console

ROW = ("edge-1", "no, 12 min ago", "digits/1\nwords/12", "digits/2\nwords/12", "digits/2 probation", "intel-openvino")


def test_a_device_can_neither_steer_the_terminal_nor_break_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("device", "says"), [("edge-1", "[/red] [bold]\x1b]0;title\x07 \x9b2J")])
    assert "edge-1  [/red] [bold]?]0;title? ?2J" in capsys.readouterr().out


def test_a_row_of_usual_length_is_whole_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "MAX_WIDTH", 80)
    console.table(("device", "online", "runs", "assigned", "doing", "profile"), [ROW])
    _, first, second = capsys.readouterr().out.splitlines()
    assert first == "edge-1  no, 12 min ago  digits/1  digits/2  digits/2 probation  intel-openvino"
    assert second.split() == ["words/12", "words/12"]


def test_long_text_is_broken_between_words_and_everything_else_left_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "MAX_WIDTH", 60)
    console.table(("release", "size", "guarantee"), [("digits/1", "2.6 KiB", "a promise " * 8)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("digits/1  2.6 KiB  a promise ")
    assert all(len(line) <= 60 and set(line.split()[-2:]) <= {"a", "promise"} for line in lines[1:])
