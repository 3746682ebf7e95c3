"""Memory that runs out under a real limit: one sentence with the way out, exit code 1, and a run that says FAILED."""

from __future__ import annotations

import errno
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import PATIENCE, environment, words_of
from run_tools import config_of, newest

from manual_backprop.common.errors import OutOfMemory, is_out_of_memory, memory_errors
from manual_backprop.study.estimates import memory
from manual_backprop.study.estimates.memory import estimate_memory, gigabytes, what_would_fit
from manual_backprop.tracking.run_directory import read_run

TOO_MUCH = 2**60  # bytes


def test_the_words_of_torch_numpy_and_the_system_are_known() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(TOO_MUCH, dtype=np.uint8)
    for error in (of_torch.value, of_numpy.value, OSError(errno.ENOMEM, "Cannot allocate memory")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left"), ValueError("out of memory")):
        assert not is_out_of_memory(other)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), memory_errors(lambda: "unused"):
        raise RuntimeError("shapes differ")
    with pytest.raises(OutOfMemory, match=r"^what to do$"), memory_errors(lambda: "what to do"):
        torch.empty(TOO_MUCH, dtype=torch.uint8)


def test_the_keys_that_would_make_it_fit(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tried: with them the estimate fits, and the same sequences make a step."""
    monkeypatch.setattr(memory, "resident_bytes", lambda which: 10**8)
    monkeypatch.setattr(memory, "FITS", 1.0)
    sizes = ("model.d_model=64", "model.d_ffn=256", "model.max_seq_len=64", "training.batch_size=12")
    config = config_of(text, *sizes, "training.gradient_accumulation_steps=2")
    network = config.network_config(257)
    needed = estimate_memory(config, network).on_device
    for share, batch_size, steps in ((0.75, 6, 4), (0.4, 4, 6)):
        there = estimate_memory(config, network)
        limit = there.process + there.state + round(share * there.working)
        monkeypatch.setattr(memory, "memory_of", lambda device, limit=limit: limit)
        found = what_would_fit(config, network)
        assert found.startswith(f"The memory is not enough for this run: it needs about {gigabytes(needed)}, and this ")
        assert f"training.batch_size={batch_size} training.gradient_accumulation_steps={steps} " in found
        assert "training.recompute=block" in found
    monkeypatch.setattr(memory, "memory_of", lambda device: 1000)
    assert what_would_fit(config, network).endswith("has 0 MB. Choose a smaller model.max_seq_len or model.")
    assert "lower training.batch_size=12" in what_would_fit(config, None)


@pytest.mark.slow
def test_a_run_without_enough_memory_ends_in_one_sentence(tmp_path: Path, text: Path) -> None:
    arguments = (
        *("model=medium", "training.batch_size=4096", "training=smoke", "dataset=text", f"dataset.path='{text}'"),
        *("tokenizer=byte", "tracking=none", "device=cpu", "device.threads=1"),
    )
    done = subprocess.run(
        words_of("manual_backprop.run", arguments),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("The memory is not enough for this run: ")
    assert "gradient_accumulation_steps" in done.stderr
    assert read_run(newest(tmp_path))["status"] == "FAILED"
