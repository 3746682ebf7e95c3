"""metrics.jsonl: nothing lost, nothing rounded, nothing torn."""

import json
import math
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from manual_backprop.common.errors import InputError
from manual_backprop.tracking.metrics_file import MetricsFile, read_entries


def test_numbers_come_back_unrounded(tmp_path: Path) -> None:
    rng = random.Random(1)
    values = [rng.uniform(-1, 1) * 10 ** rng.randint(-300, 300) for _ in range(100)] + [0.1 + 0.2, -0.0, 5e-324]
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step, value in enumerate(values):
        file.append(step, {"train/loss": value, "flops": 2**60 + 1})
    file.close()
    entries = list(read_entries(file.path))
    assert [entry.metrics["train/loss"] for entry in entries] == values
    assert entries[0].metrics["flops"] == 2**60 + 1
    assert math.copysign(1, entries[-2].metrics["train/loss"]) == -1


def test_the_file_is_the_documented_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.007)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(0.5), "e": 3})
    assert file.length == file.path.stat().st_size, "every line is in the file at once"
    header, line = file.path.read_text().splitlines()
    assert json.loads(header) == {"format": "manual_backprop.metrics", "version": 1}

    def no_extension(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(line, parse_constant=no_extension)
    metrics = {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5, "e": 3}
    assert content == {"step": 1, "time_ms": 7, "metrics": metrics}
    (entry,) = read_entries(file.path)
    assert math.isnan(entry.metrics["a"])
    assert (entry.metrics["b"], entry.metrics["c"]) == (math.inf, -math.inf)


def test_a_reader_ignores_a_torn_last_line_and_the_next_owner_cuts_it_off(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append(step, {"x": step})
    file.close()
    whole = file.path.read_bytes()
    end_of_second = [entry.end for entry in read_entries(file.path)][1]
    for length in range(end_of_second, len(whole)):
        file.path.write_bytes(whole[:length])
        assert [entry.step for entry in read_entries(file.path)] == [1, 2]
        again = MetricsFile(file.path)
        again.append(4, {"x": 4})
        again.close()
        damaged: list[int] = []
        assert [entry.step for entry in read_entries(file.path, damaged=damaged)] == [1, 2, 4]
        assert damaged == []


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"format": "manual_b')
    assert list(read_entries(path)) == []
    file = MetricsFile(path)
    file.append(1, {"x": 1})
    file.close()
    assert [entry.step for entry in read_entries(path)] == [1]


def test_what_lies_beyond_a_checkpoint_is_moved(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"x": 1})
    remembered = file.sync()
    file.append(2, {"x": 2})
    file.append(3, {"x": 3})
    file.close()
    resumed = MetricsFile(file.path)
    resumed.truncate(remembered)
    assert resumed.length == remembered
    resumed.append(2, {"x": 20})
    resumed.close()
    assert [(entry.step, entry.metrics["x"]) for entry in read_entries(file.path)] == [(1, 1), (2, 20)]
    superseded = list(read_entries(tmp_path / "superseded.jsonl"))
    assert [(entry.step, entry.metrics["x"]) for entry in superseded] == [(2, 2), (3, 3)]


@pytest.mark.parametrize("length", [-1, 0, 5, 10_000])
def test_a_length_of_another_file_is_refused(tmp_path: Path, length: int) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"x": 1})
    before = file.path.read_bytes()
    with pytest.raises(InputError, match=f"no line that ends at byte {length}"):
        file.truncate(length)
    assert file.path.read_bytes() == before


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    for content in ("hello\n", '{"step": 1, "time_ms": 1, "metrics": {}}\n', "x" * 20_000, "[1]\n"):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(InputError, match="is not a metrics file"):
            list(read_entries(tmp_path / "metrics.jsonl"))
        with pytest.raises(InputError, match="is not a metrics file"):
            MetricsFile(tmp_path / "metrics.jsonl")
        assert (tmp_path / "metrics.jsonl").read_text() == content
    (tmp_path / "metrics.jsonl").write_text('{"format": "manual_backprop.metrics", "version": 2}\n')
    with pytest.raises(InputError, match="version 2"):
        list(read_entries(tmp_path / "metrics.jsonl"))


def test_a_damaged_line_in_the_middle_is_skipped_and_reported(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append(step, {"x": step})
    file.close()
    lines = file.path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\x00" * (len(lines[2]) - 1) + b"\n"  # what a power cut may leave
    file.path.write_bytes(b"".join(lines))
    damaged: list[int] = []
    assert [entry.step for entry in read_entries(file.path, damaged=damaged)] == [1, 3]
    assert damaged == [len(lines[0]) + len(lines[1])]


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_kill_9_loses_no_line_that_was_appended(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from manual_backprop.tracking.metrics_file import MetricsFile
        file = MetricsFile(sys.argv[1])
        for step in range(1, 101):
            file.append(step, {"x": step})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_script(script, tmp_path / "metrics.jsonl").returncode == -signal.SIGKILL
    assert [entry.step for entry in read_entries(tmp_path / "metrics.jsonl")] == list(range(1, 101))


def test_lines_that_a_full_disk_refuses_wait_and_are_not_torn(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from manual_backprop.common.errors import StorageError
        from manual_backprop.tracking.metrics_file import MetricsFile
        file = MetricsFile(sys.argv[1])
        file.append(1, {"x": 1})
        limit = file.length + 10  # in the middle of the next line
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        file.append(2, {"x": 2})
        file.append(3, {"x": 3})
        assert file.path.stat().st_size == file.length, "no part of a line stays"
        try:
            file.sync()
        except StorageError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.append(4, {"x": 4})
        file.close()
    """
    done = run_script(script, tmp_path / "metrics.jsonl")
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout
    assert done.stderr.count("metrics wait in memory") == 1
    damaged: list[int] = []
    assert [entry.step for entry in read_entries(tmp_path / "metrics.jsonl", damaged=damaged)] == [1, 2, 3, 4]
    assert damaged == []


def test_the_module_needs_neither_torch_nor_mlflow_nor_hydra() -> None:
    script = """
        import sys
        import manual_backprop.tracking
        from manual_backprop.checkpoints.checkpoint import CheckpointManager
        loaded = {"torch", "mlflow", "hydra", "omegaconf", "safetensors", "numpy"} & set(sys.modules)
        assert not loaded, loaded
    """
    done = run_script(script)
    assert done.returncode == 0, done.stderr
