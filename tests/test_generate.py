"""The command that continues a text: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from command_tools import environment, words_of

from manual_backprop import generate
from manual_backprop.common import exit_codes
from manual_backprop.trained_models.saved_model import load

pytestmark = pytest.mark.usefixtures("here")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints behind its first line."""
    assert generate.main(list(arguments)) is None
    first, text = capsys.readouterr().out.split("\n", 1)
    assert first == load(arguments[0]).line
    return text


def continued(prompt: str, max_length: int, seed: int | None = None, **sampling: float | None) -> str:
    """By the library."""
    saved = load("last")
    tokenizer = saved.tokenizer()
    tokens = saved.model.generate(
        torch.tensor([tokenizer.encode(prompt) or [256]]), max_length, eos_token_id=256, seed=seed, **sampling
    )
    return tokenizer.decode(tokens[0].tolist())


def test_it_says_what_the_library_says(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("last", "--prompt", "the cat", "--max-length", "30")
    assert said(capsys, *given, "--temperature", "0") == continued("the cat", 30, temperature=0) + "\n"
    drawn = said(capsys, *given, "--seed", "5")
    assert drawn == continued("the cat", 30, seed=5, temperature=0.8, top_k=50) + "\n"
    free = said(capsys, *given, "--seed", "5", "--top-k", "0", "--temperature", "3", "--top-p", "0.9")
    assert free == continued("the cat", 30, seed=5, temperature=3, top_k=0, top_p=0.9) + "\n" != drawn
    assert said(capsys, "last", "--prompt", "", "--temperature", "0") == continued("", 100, temperature=0) + "\n"
    assert said(capsys, "last", "--prompt", "é 😀", "--max-length", "0") == "é 😀\n"


def test_a_search_shows_what_the_library_finds(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("last", "--prompt", "the cat", "--max-length", "12", "--beams", "3")
    usual, bare = (continued("the cat", 12, beams=3, **more) for more in ({}, {"length_penalty": 0.0}))
    assert said(capsys, *given) == usual + "\n"
    assert said(capsys, *given, "--length-penalty", "0", "--seed", "4") == bare + "\n"
    new, stop = usual.removeprefix("the cat"), usual[9:11]
    assert said(capsys, *given, "--stop", stop) == f"the cat{new[: new.index(stop)]}\n"


def test_several_samples_have_seeds_one_after_another(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "last", "--prompt", "owl", "--max-length", "9", "--num-samples", "2", "--seed", "3")
    first, second = (continued("owl", 9, seed=seed, temperature=0.8, top_k=50) for seed in (3, 4))
    assert text == f"\n--- sample 1 of 2 ---\n{first}\n\n--- sample 2 of 2 ---\n{second}\n"


def test_it_ends_before_a_stop(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = continued("the", 40, temperature=0)[3:]
    stop = whole[10:12]
    text = said(capsys, "last", *("--prompt", "the", "--temperature", "0", f"--stop={stop}", "--stop=#"))
    assert text == f"the{whole[: whole.index(stop)]}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["last"], "give --prompt TEXT, or --source SOURCE"),
        (["last", "--promt", "x"], "--promt: there is no such option; did you mean --prompt?"),
        (["last", "--prompt", "x", "--max_length", "3"], "did you mean --max-length?"),
        (["last", "--prompt", "x", "--tokens", "3"], "--tokens: there is no such option\n"),  # and nothing like it
        (["last", "--prompt", "the", "cat"], "cat: unexpected argument; a text of several words needs quotes"),
        (["last", "--prompt", "x", "--temperature", "-1"], "--temperature: must be a number, at least 0, was '-1'"),
        (["last", "--prompt", "x", "--temperature", "inf"], "--temperature: must be a number"),
        (["last", "--prompt", "x", "--top-p", "0"], "--top-p: must be a number, more than 0 and at most 1"),
        (["last", "--prompt", "x", "--top-k", "few"], "--top-k: must be a whole number of at least 0, was 'few'"),
        (["last", "--prompt", "x", "--num-samples", "0"], "--num-samples: must be a whole number of at least 1"),
        (["last", "--prompt", "x", "--beams", "0"], "--beams: must be a whole number of at least 1"),
        (["last", "--prompt", "x", "--beams", "2", "--num-samples", "2"], "--num-samples: beam search (--beams) finds"),
        (["last", "--prompt", "x", "--length-penalty", "-1"], "--length-penalty: must be a number, at least 0"),
        (["last", "--prompt", "x", "--stop", ""], "--stop: the text must not be empty"),
        (["wings", "--prompt", "x"], "there is no run 'wings'"),
        (["last", "--prompt", "\udcff"], "half of a surrogate pair"),
        (["last", "--prompt", "x", "--device", "cuda"], "no NVIDIA GPU can be used"),
    ],
)
def test_what_is_refused(copy: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert exit_codes.exit_code_of(lambda: generate.main(arguments)) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) <= 2


def test_a_character_that_the_model_has_never_seen(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from run_tools import train

    train(tmp_path, text, "tokenizer=char", "training.max_steps=1", "training.eval_every=1", "training.sample_length=0")
    assert exit_codes.exit_code_of(lambda: generate.main(["last", "--prompt", "cat?"])) == 2
    assert "The character '?' (U+003F, at position 3) is not among" in capsys.readouterr().err
    assert exit_codes.exit_code_of(lambda: generate.main(["last", "--prompt", ""])) == 2
    assert "The prompt is empty" in capsys.readouterr().err


def test_from_a_pipe_until_interrupted(copy: Path, tmp_path: Path) -> None:
    """stdin without its last line break; every character at once; Ctrl-C is 130 without a traceback."""
    process = subprocess.Popen(
        words_of(
            "manual_backprop.generate", ("last", "--prompt", "-", "--max-length", "100000000", "--temperature", "0")
        ),
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write("the owl é\n".encode())
        process.stdin.close()
        assert process.stdout.readline().startswith(b"custom (gpt2, fp32)")
        begin = process.stdout.read(40)
        assert begin.startswith("the owl é".encode())
        assert begin[10:11] != b"\n"
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(timeout=60) == 130
        assert told == b"interrupted\n"
    finally:
        process.kill()


def test_what_comes_in_must_be_utf8(tmp_path: Path) -> None:
    done = subprocess.run(
        words_of("manual_backprop.generate", ("last", "--prompt", "-")),
        cwd=tmp_path,
        env=environment(),
        input=b"\xff",
        capture_output=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"--prompt -: the text from stdin is not UTF-8 (byte 0)")


def test_a_run_that_lies_elsewhere(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(copy, moved)
    assert said(capsys, str(moved), "--prompt", "the", "--max-length", "3").startswith("the")
