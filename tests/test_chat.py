"""The chat in a terminal: a real pseudo-terminal, so that line editing and Ctrl-C are the real ones."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_tools import PATIENCE, environment, words_of

from manual_backprop import chat
from manual_backprop.common import exit_codes
from manual_backprop.trained_models.chat import CHAT_COMMANDS

pytestmark = pytest.mark.usefixtures("here")
UP, CTRL_A, CTRL_C, CTRL_D = "\x1b[A", "\x01", "\x03", "\x04"


class Terminal:
    """A command behind a pseudo-terminal, with the output since the last check."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {"TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal: Ctrl-C works
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, pattern: str) -> str:
        """The output up to the end of `pattern`."""
        end = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, f"{pattern!r} is not in {self.shown!r}"
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.ours, 4096).decode("utf-8", "replace")
                except OSError:  # closed at the other end
                    assert re.search(pattern, self.shown), f"{pattern!r} is not in {self.shown!r}"
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen


@pytest.fixture
def terminal(copy: Path, tmp_path: Path) -> Iterator[Terminal]:
    command = words_of("manual_backprop.chat", ("last", "--seed", "1", "--max-length", "12"))
    opened = Terminal(command, tmp_path, environment())
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.ours)


def test_a_conversation(terminal: Terminal) -> None:
    assert "custom (gpt2, fp32)" in terminal.until(r"Ctrl-D quits\.\r\n")
    terminal.until("> ")
    terminal.type("the owl\n")
    first = terminal.until(r"\r\n(?s:.*?)\r\n.*> ")
    assert "the owl" in first
    # an earlier line comes back, and is edited at its start
    terminal.type(f"{UP}{CTRL_A}see \n")
    assert "see the owl" in terminal.until(r"\r\n(?s:.*?)\r\n.*> ")
    # a reply that would take hours is stopped, the chat is not
    terminal.type("temp 0\nlength 100000000\n")
    terminal.until(r"temp 0, topk 50, length 100000000\r\n.*> ")
    terminal.type("cat\n")
    terminal.until(r"(?s)cat\r\n.*cat.{20}")
    terminal.type(CTRL_C)
    terminal.until(r"\^C(?s:.*?)\r\n.*> ")
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.5)  # Python's readline misses a Ctrl-C between a character that it reads and its wait for the next one
    terminal.type(CTRL_C)
    terminal.until(r"\r\n.*> ")
    assert terminal.process.poll() is None
    terminal.type("length 3\n")
    terminal.until(r"temp 0, topk 50, length 3\r\n.*> ")
    terminal.type(CTRL_D)
    assert terminal.process.wait(timeout=PATIENCE) == 0


def lines(monkeypatch: pytest.MonkeyPatch, *typed: str) -> None:
    """Simulates typed lines, in this process."""
    waiting = iter(typed)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_what_can_be_typed(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines(
        monkeypatch,
        *("temp 0", "topk 40", "length 7", "help", "temp hot", "topk -1", "temp", "", "   ", "the cat", "the cat"),
    )
    assert chat.main(["last"]) == 0
    shown = capsys.readouterr().out
    assert "temp 0, topk 50, length 100\ntemp 0, topk 40, length 100\ntemp 0, topk 40, length 7\n" in shown
    assert CHAT_COMMANDS in shown
    assert (
        "temp: must be a number, at least 0, was 'hot'\ntopk: must be a whole number of at least 0, was '-1'" in shown
    )
    assert "was '-1'\ntemp" in shown  # one word is text, and is continued
    replies = shown[shown.index("the cat") : -1]  # without the line break of Ctrl-D
    assert len(replies) > 2 * len("the cat\n")
    assert replies[: len(replies) // 2] == replies[len(replies) // 2 :]  # greedy


@pytest.mark.parametrize("word", ["quit", "exit", "q", " quit "])
def test_words_that_end_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    lines(monkeypatch, word, "the cat")
    assert chat.main(["last"]) == 0
    assert "the cat" not in capsys.readouterr().out


def test_a_line_that_cannot_be_read_ends_nothing(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(monkeypatch, "\udcff", "the cat")
    assert chat.main(["last", "--max-length", "2"]) == 0
    shown = capsys.readouterr().out
    assert "half of a surrogate pair" in shown
    assert "\nthe cat" in shown


def test_a_terminal_is_not_given_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from manual_backprop.trained_models.text_stream import show

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show("a\x1b[2J\tb\r\n\u202ec é")
    assert capsys.readouterr().out == "a\ufffd[2J\tb\ufffd\n\ufffdc é"


def test_wrong_input_is_refused_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_codes.exit_code_of(lambda: chat.main(["last", "--temp", "1"])) == 2
    assert "did you mean --temperature?" in capsys.readouterr().err
