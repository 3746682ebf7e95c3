"""Checkpoints against what really happens: kills at every point of a save, full disks, flipped bits, foreign files."""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_disk import run_on_small_disk

from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint, step_of, verify
from manual_backprop.common.errors import CheckpointError, InputError, StorageError


def some_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(64, generator=generator)
    return {
        "parameters": {"weight": buffer[:32].view(4, 8), "bias": buffer[32:37], "count": torch.tensor(seed)},
        "optimizer": {"first_moment": torch.randn(6, generator=generator, dtype=torch.float64)},
    }


def assert_same(got: dict[str, dict[str, torch.Tensor]], want: dict[str, dict[str, torch.Tensor]]) -> None:
    assert got.keys() == want.keys()
    for group in want:
        assert got[group].keys() == want[group].keys()
        for name, tensor in want[group].items():
            assert got[group][name].dtype == tensor.dtype
            assert torch.equal(got[group][name], tensor), f"{group}/{name}"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    extra = tmp_path / "tokenizer.json"
    extra.write_text('{"name": "byte"}')
    return CheckpointManager(tmp_path / "checkpoints").save(3, some_tensors(), {"seed": 1}, 2.5, [extra])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_every_number_format_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"parameters": {"x": (torch.randn(5, 7) * 3).to(dtype), "empty": torch.empty(0, 3, dtype=dtype)}}
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(1, tensors, {"learning_rate": 0.1 + 0.2, "name": "größer"}, metric=1 / 3)
    checkpoint = checkpoints.load()
    assert_same(checkpoint.tensors, tensors)
    assert (checkpoint.step, checkpoint.metric) == (1, 1 / 3)
    assert checkpoint.state == {"learning_rate": 0.1 + 0.2, "name": "größer"}


def test_views_of_one_buffer_overlapping_or_transposed_come_back(tmp_path: Path) -> None:
    buffer = torch.arange(24.0)
    tensors = {
        "parameters": {
            "first": buffer[:8].view(2, 4),
            "second": buffer[8:12],
            "overlapping": buffer[4:10],
            "same": buffer[:8].view(2, 4),
            "transposed": buffer[12:].view(3, 4).T,
            "needs_gradient": torch.ones(3, requires_grad=True),
        }
    }
    checkpoints = CheckpointManager(tmp_path)
    path = checkpoints.save(1, tensors, {})
    assert_same(checkpoints.load().tensors, tensors)
    assert (path / "parameters.safetensors").stat().st_size < 2000, "a view must not bring its whole buffer along"


def test_loaded_tensors_outlive_the_checkpoint(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    shutil.rmtree(saved)
    assert_same(checkpoint.tensors, some_tensors())


def test_the_best_and_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, keep=2)
    assert checkpoints.list() == []
    assert checkpoints.latest() is checkpoints.best() is checkpoints.newest_sound() is None
    for step, metric in enumerate([4.0, 1.5, 3.0, float("nan"), 2.0, None], start=1):
        checkpoints.save(step, some_tensors(step), {}, metric)
    assert [step_of(path) for path in checkpoints.list()] == [2, 5, 6]
    assert step_of(checkpoints.best()) == 2
    assert step_of(checkpoints.latest()) == 6
    assert checkpoints.load().metric is None
    assert_same(checkpoints.load(checkpoints.best()).tensors, some_tensors(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000005", "step-000006"]


def test_a_step_beyond_six_digits_is_the_latest(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path)
    for step in (999_999, 1_000_000):
        checkpoints.save(step, {}, {})
    assert checkpoints.load().step == 1_000_000


def test_the_same_step_again_is_left_alone_and_another_one_set_aside(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path)
    first = checkpoints.save(5, some_tensors(1), {})
    inode = first.stat().st_ino
    assert checkpoints.save(5, some_tensors(1), {}) == first
    assert first.stat().st_ino == inode
    checkpoints.save(5, some_tensors(2), {})
    assert_same(checkpoints.load().tensors, some_tensors(2))
    assert_same(load_checkpoint(tmp_path / "superseded" / "step-000005").tensors, some_tensors(1))


def test_checkpoints_of_the_path_that_was_left_are_set_aside(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, some_tensors(step), {}, metric=1 / step)
    checkpoints.set_aside_after(10)
    assert checkpoints.load().step == 10
    assert step_of(checkpoints.best()) == 10
    verify(tmp_path / "superseded" / "step-000030")


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "parameters.safetensors", "optimizer.safetensors", "tokenizer.json"]
)
def test_a_flipped_bit_in_any_byte_is_refused_by_name(saved: Path, name: str) -> None:
    file = saved / name
    sound = file.read_bytes()
    rng = random.Random(0)
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(saved)
        if name != "manifest.json":
            assert str(file) in str(caught.value)
    file.write_bytes(sound)
    verify(saved)


def test_damage_is_named_and_the_newest_sound_checkpoint_is_offered(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, some_tensors(step), {})
    damaged = checkpoints.latest() / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-000003/optimizer.safetensors is damaged.*bytes.*step-000002"):
        checkpoints.load()
    assert step_of(checkpoints.newest_sound()) == 2
    assert checkpoints.load(tmp_path / "step-000002").step == 2


def test_a_missing_an_added_and_a_linked_file_are_refused(saved: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "state.json", "optimizer.safetensors", "tokenizer.json"):
        shutil.move(saved / name, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name} is missing"):
            load_checkpoint(saved)
        (saved / name).symlink_to(tmp_path / name)
        if name != "manifest.json":
            with pytest.raises(CheckpointError, match="plain file"):
                load_checkpoint(saved)
        (saved / name).unlink()
        shutil.move(tmp_path / name, saved / name)
    (saved / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes.txt is not in the checkpoint's manifest"):
        load_checkpoint(saved)


def test_a_renamed_checkpoint_and_another_directory_are_refused(saved: Path, tmp_path: Path) -> None:
    saved.rename(saved.with_name("step-000009"))
    with pytest.raises(CheckpointError, match="holds the checkpoint of step 3"):
        load_checkpoint(saved.with_name("step-000009"))
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        CheckpointManager(tmp_path / "checkpoints").load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        CheckpointManager(tmp_path / "empty").load()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's content was read to be compared."""
    counted: Counter[str] = Counter()
    real = hashlib.file_digest

    def counting(file: Any, digest: str) -> Any:
        counted[Path(file.name).name] += 1
        return real(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return counted


FILES = ("state.json", "parameters.safetensors", "optimizer.safetensors", "tokenizer.json")


def test_choosing_and_loading_read_every_file_once(
    saved: Path, hashed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manual_backprop.checkpoints.checkpoint.SETTLED", 0.0)
    checkpoints = CheckpointManager(saved.parent)
    assert checkpoints.newest_sound() == checkpoints.verified() == checkpoints.verified(saved) == saved
    checkpoints.load()
    assert hashed == dict.fromkeys(FILES, 1)
    checkpoints.load()
    assert hashed == dict.fromkeys(FILES, 2), "each load rests on a reading of its own"
    checkpoints.verified()
    file = saved / "parameters.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load_checkpoint(saved)


def test_what_was_changed_just_now_is_read_again(saved: Path, hashed: Counter[str]) -> None:
    """Its times might not show another change."""
    checkpoints = CheckpointManager(saved.parent)
    checkpoints.verified()
    checkpoints.load()
    assert hashed == dict.fromkeys(FILES, 2)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_is_refused_and_never_runs(saved: Path, tmp_path: Path) -> None:
    """Even when the manifest vouches for it."""
    payload = pickle.dumps(Bomb(tmp_path / "executed"))
    (saved / "optimizer.pt").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is not in"):
        load_checkpoint(saved)
    (saved / "optimizer.pt").unlink()
    file = tmp_path / "extra.pt"
    file.write_bytes(payload)
    checkpoints = CheckpointManager(tmp_path / "vouched")
    path = checkpoints.save(1, {}, {}, files=[file])
    assert checkpoints.load().tensors == {}, "a file that nobody asked for is not read"
    shutil.copy(file, tmp_path / "parameters.safetensors")
    path = checkpoints.save(2, {}, {}, files=[tmp_path / "parameters.safetensors"])
    with pytest.raises(CheckpointError, match=r"parameters.safetensors is not a safetensors file"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_manifest_that_points_outside_is_refused(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["../secret"] = manifest["files"]["state.json"]
    (saved / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match="secret"):
        load_checkpoint(saved)


def test_a_failed_save_leaves_everything_as_it_was(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(1, some_tensors(), {})
    with pytest.raises(StorageError, match=r"step-000002.*No such file"):
        checkpoints.save(2, some_tensors(), {}, files=[tmp_path / "absent.json"])
    with pytest.raises(InputError, match="state is not JSON"):
        checkpoints.save(2, some_tensors(), {"not JSON": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoints.load().step == 1


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    huge = torch.empty(1, dtype=torch.float32).expand(10**15)  # four million gigabytes, without memory
    checkpoints = CheckpointManager(tmp_path / "not" / "there" / "yet")
    with pytest.raises(StorageError, match=r"needs 4000000001\.0 MB, but .* MB are free"):
        checkpoints.check_free_space({"parameters": {"huge": huge}})
    checkpoints.check_free_space(some_tensors(), copies=3)


def run_script(script: str, *arguments: object, timeout: float = 120) -> str:
    """Run Python in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SAVER = """
    import os, random, shutil, signal, sys, time
    import torch
    from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint, verify
    from manual_backprop.common.errors import CheckpointError, StorageError

    def tensors(step, size=50_000):
        w = torch.full((size,), float(step))
        return {"parameters": {"w": w}, "optimizer": {"m": -w}}

    def check(directory):
        checkpoints = CheckpointManager(directory)
        for path in checkpoints.list():
            found = load_checkpoint(path)  # every one that is visible is sound
            assert (found.tensors["parameters"]["w"] == found.step).all()
            assert (found.tensors["optimizer"]["m"] == -found.step).all()
        assert checkpoints.latest() is not None
        return checkpoints.load().step
"""


@pytest.mark.slow
def test_a_kill_at_every_point_of_a_save_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    """The child kills itself with SIGKILL before its k-th access to a file, for k = 1, 2, ... until a save ends."""
    script = (
        SAVER
        + """
    directory, steps, survived = sys.argv[1], set(), False
    for point in range(1, 200):
        shutil.rmtree(directory, ignore_errors=True)
        checkpoints = CheckpointManager(directory, keep=1)
        checkpoints.save(1, tensors(1, 50), {}, metric=1.0)
        checkpoints.save(2, tensors(2, 50), {}, metric=2.0)
        child = os.fork()
        if child == 0:
            seen = 0
            def count(event, arguments):
                global seen
                if event in ("open", "shutil.copyfile", "shutil.rmtree") or event.startswith("os."):
                    seen += 1
                    if seen == point:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(count)
            CheckpointManager(directory, keep=1).save(3, tensors(3, 50), {}, metric=3.0)
            os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        steps.add(check(directory))
        assert CheckpointManager(directory).best().name == "step-000001"
        CheckpointManager(directory, keep=1).save(4, tensors(4, 50), {}, metric=4.0)
        left = sorted(os.listdir(directory))
        assert left == ["step-000001", "step-000004"], left  # no leftovers after the next save
        if survived:
            break
    print(point, sorted(steps))
    """
    )
    points, steps = run_script(script, tmp_path / "checkpoints").split(" ", 1)
    assert int(points) > 20
    assert steps.strip() == "[2, 3]", "killed before the rename the old one counts, after it the new one"


def killed_at_random(tmp_path: Path, times: int) -> None:
    script = (
        SAVER
        + """
    directory, rng, step = sys.argv[1], random.Random(0), 0
    CheckpointManager(directory).save(0, tensors(0), {}, metric=0.0)
    for _ in range(int(sys.argv[2])):
        child = os.fork()
        if child == 0:
            checkpoints = CheckpointManager(directory, keep=2)
            while True:
                step += 1
                checkpoints.save(step, tensors(step), {}, metric=rng.random())
        time.sleep(rng.uniform(0.005, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = check(directory)
    print(step)
    """
    )
    assert int(run_script(script, tmp_path / "checkpoints", times)) > 1


def test_kills_at_random_moments_leave_a_sound_checkpoint(tmp_path: Path) -> None:
    killed_at_random(tmp_path, 10)


@pytest.mark.parametrize(
    "times", [pytest.param(100, marks=pytest.mark.slow), pytest.param(400, marks=pytest.mark.nightly)]
)
def test_many_kills_at_random_moments_leave_a_sound_checkpoint(times: int, tmp_path: Path) -> None:
    killed_at_random(tmp_path, times)


def test_a_disk_that_refuses_in_the_middle_costs_the_save_only(tmp_path: Path) -> None:
    """A file-size limit stands for a full disk: it makes the same write fail, with another number."""
    script = (
        SAVER
        + """
    import resource
    directory = sys.argv[1]
    checkpoints = CheckpointManager(directory)
    checkpoints.save(1, tensors(1, 100), {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    for groups in (tensors(2), {"parameters": {}, "optimizer": tensors(2)["optimizer"]}):
        try:
            checkpoints.save(2, groups, {})
        except StorageError as error:
            print(error)
        else:
            raise AssertionError("nothing was refused")
    assert os.listdir(directory) == ["step-000001"], os.listdir(directory)
    assert check(directory) == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(2, tensors(2), {})
    assert check(directory) == 2
    """
    )
    printed = run_script(script, tmp_path / "checkpoints").splitlines()
    assert len(printed) == 2
    assert "parameters.safetensors" in printed[0]
    assert "optimizer.safetensors" in printed[1]


def test_a_full_small_disk_is_refused_with_both_sizes(tmp_path: Path) -> None:
    script = (
        SAVER
        + """
    directory = sys.argv[1] + "/checkpoints"
    checkpoints = CheckpointManager(directory, keep=1)
    checkpoints.save(1, tensors(1), {})
    try:
        checkpoints.save(2, tensors(2, 1_000_000), {})
    except StorageError as error:
        print(error)
    assert check(directory) == 1
    checkpoints.save(3, tensors(3), {})
    with open(sys.argv[1] + "/filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    try:
        checkpoints.save(4, tensors(4), {})
    except StorageError as error:
        print(error)
    assert check(directory) == 3
    """
    )
    done = run_on_small_disk(script, tmp_path, megabytes=4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("free some space") == 2
