"""Checkpoints: directories `step-NNNNNN/` of safetensors and JSON, each complete or absent.

    parameters.safetensors  optimizer.safetensors  ...   one file for each group of tensors
    state.json                                           {"version", "step", "metric", "state"}
    tokenizer.json config.yaml ...                       small files that the caller adds
    manifest.json                                        size and SHA-256 of every other file, written last

A save writes into a hidden staging directory, syncs every file to the disk, writes the manifest and renames: `kill -9`
at any moment leaves the previous checkpoints and at most a hidden directory, which the next save removes. A load always
compares every file with the manifest, since safetensors does not notice a flipped bit. It compares only once: files
that this process has verified to choose a checkpoint are not read again to load it, unless one has changed. Nothing is
ever unpickled. `latest` and `best` are computed from the directory, never stored. Only the caller interprets the state.

Listing and verifying need the standard library only; torch and safetensors are imported by `save` and `load`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from manual_backprop.common.digests import file_digest
from manual_backprop.common.durable_files import process_is_alive, storage_errors, sync_directory, sync_file
from manual_backprop.common.errors import CheckpointError, InputError, StorageError
from manual_backprop.common.json_files import read_object

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
METRIC = "validation/loss"  # chooses the best checkpoint, unless the state names another metric
MANIFEST = "manifest.json"
STATE = "state.json"
SUPERSEDED = "superseded"
_NAME = re.compile(r"step-(\d{6,})")
_STAGING = re.compile(r"\.staging-step-\d+-(\d+)-[0-9a-f]+")
Paths = list[Path]  # inside CheckpointManager, `list` is its method
FileStatus = dict[str, tuple[int, ...]]  # file name -> device, inode, mode, size and time of the last change [ns]
SETTLED = 2.0  # [s], the resolution of file times: a file changed again within it may keep the same time
_verified: dict[Path, FileStatus] = {}  # checkpoints verified since they were last loaded, and their files' status
_ROOM_FOR_SMALL_FILES = 1 << 20  # [bytes] for JSON, safetensors headers and directory entries


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. Tensors are on the CPU; `metric` is None if there was none or it was not finite."""

    path: Path
    step: int
    metric: float | None
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    metric_name: str = METRIC


class Restorable(Protocol):
    """A model that a checkpoint can hold."""

    step: int

    def tensors_and_state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]: ...

    def restore(self, checkpoint: Checkpoint) -> None: ...


class StatefulOptimizer(Protocol):
    """An optimizer (`optim`) whose state is a mapping of names to tensors, not copied."""

    def state_views(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class CheckpointManager:
    """The checkpoints of one run: the newest `keep` and the one with the best metric.

    One process may save; any number may read at the same time.

    With a model, which is a wrapper such as CustomTransformerWrapper:

    >>> model = CustomTransformerWrapper(vocab_size=8, d_model=8, n_blocks=1, n_heads=2, d_ffn=8, max_seq_len=4)
    >>> checkpoints = CheckpointManager("my_run/checkpoints", keep=2)
    >>> checkpoints.save_checkpoint(model, step=100, metric=3.21, state={"epoch": 1}).name
    'step-000100'
    >>> checkpoint = checkpoints.load_checkpoint(model)  # the latest
    >>> checkpoint.step, checkpoint.metric, checkpoint.state["epoch"]
    (100, 3.21, 1)

    And with tensors of any kind, in groups:

    >>> checkpoints.save(200, {"parameters": {"weight": torch.ones(2)}}, {"seed": 1}, metric=4.5).name
    'step-000200'
    >>> checkpoints.load().tensors["parameters"]["weight"]
    tensor([1., 1.])
    >>> checkpoints.best().name, checkpoints.latest().name
    ('step-000100', 'step-000200')
    """

    def __init__(self, directory: str | Path, keep: int | None = 2):
        """`keep` None: never remove a checkpoint. Raises CheckpointError for a `keep` below 1."""
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep={keep}: must be at least 1, or a run could not be resumed")
        self.directory = Path(directory)
        self.keep = keep

    # Listing

    def list(self) -> Paths:
        """All checkpoints, sorted by step. All are complete, but only `verify` tells whether they are intact."""
        with storage_errors(f"read {self.directory}"):
            found = [path for path in self.directory.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def latest(self) -> Path | None:
        """The checkpoint of the highest step; None if there is none."""
        return max(self.list(), key=step_of, default=None)

    def best(self) -> Path | None:
        """The checkpoint with the best metric (the lowest, unless its state says that higher is better), the newest
        among equals. Checkpoints without a metric are ignored."""
        with_metric = []
        for path in self.list():
            # `load` reports damage; one unreadable state must not hide the other checkpoints.
            with suppress(CheckpointError):
                content = read_state(path)
                metric = content["metric"]
                if metric is not None:
                    with_metric.append((-metric if content.get("higher_is_better") else metric, -step_of(path), path))
        return min(with_metric)[2] if with_metric else None

    def newest_sound(self) -> Path | None:
        """The newest checkpoint that is intact; None if there is none."""
        for path in reversed(self.list()):
            with suppress(CheckpointError):
                verify(path)
                return path
        return None

    # Reading

    def verified(self, path: str | Path | None = None) -> Path:
        """The path of a checkpoint (None: the latest) after verifying every byte. Raises CheckpointError as `load`."""
        with self._suggesting_another():
            chosen = self._chosen(path)
            verify(chosen)
        return chosen

    def load(self, path: str | Path | None = None) -> Checkpoint:
        """Read a checkpoint (None: the latest) after comparing every byte with its manifest.

        Raises CheckpointError, which names the damaged file and the newest sound checkpoint to use instead.
        """
        with self._suggesting_another():
            return load_checkpoint(self._chosen(path))

    def _chosen(self, path: str | Path | None) -> Path:
        chosen = self.latest() if path is None else Path(path)
        if chosen is None:
            aside = sorted((self.directory / SUPERSEDED).glob("step-*"), key=step_of)
            hint = f" (set aside earlier: {aside[-1]})" if aside else ""
            raise CheckpointError(f"{self.directory} holds no checkpoint: nothing was saved yet{hint}")
        return chosen

    @contextmanager
    def _suggesting_another(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            sound = self.newest_sound()
            hint = f"the newest sound checkpoint is {sound}" if sound else "there is no sound checkpoint beside it"
            raise CheckpointError(f"{error}; {hint}") from error

    # With a model

    def save_checkpoint(
        self,
        model: Restorable,
        step: int | None = None,
        metric: float | None = None,
        state: Mapping[str, Any] | None = None,
        optimizer: StatefulOptimizer | None = None,
    ) -> Path:
        """Save a model, and the optimizer that trains it: the one that `model.network.adamw` or `sgd` returned.

        The checkpoint is named after `step`, by default the model's own count. `state` is JSON that the caller adds to
        the model's. Raises InputError if `model` is not a model or `optimizer` not one of a model, CheckpointError if
        `state` has a key of the model's, and the errors of `save`.
        """
        _check_restorable(model, optimizer)
        tensors, own = model.tensors_and_state()
        if taken := sorted(own.keys() & (state or {}).keys()):
            raise CheckpointError(f"state has {', '.join(taken)}, which the model writes itself: use another name")
        if optimizer is not None:
            tensors = tensors | {"optimizer": optimizer.state_views()}
        return self.save(model.step if step is None else step, tensors, own | dict(state or {}), metric)

    def load_checkpoint(
        self, model: Restorable, path: str | Path | None = None, optimizer: StatefulOptimizer | None = None
    ) -> Checkpoint:
        """Load a checkpoint (None: the latest) into `model`, and its moments into `optimizer`.

        Returns the checkpoint, whose `state` has what `save_checkpoint` was given. Another precision is converted,
        and a line of the log says so. Raises InputError for no model or no optimizer of one, CheckpointError for
        a checkpoint that is damaged, or of another network or optimizer: then neither model nor optimizer is changed.
        """
        _check_restorable(model, optimizer)
        checkpoint = self.load(path)
        saved = checkpoint.tensors.get("optimizer", {})
        if optimizer is not None and _shapes(saved) != _shapes(optimizer.state_views()):
            raise CheckpointError(
                f"{checkpoint.path} holds {'the state of another optimizer' if saved else 'no optimizer'}: expected "
                "a checkpoint that save_checkpoint wrote with this optimizer"
            )
        model.restore(checkpoint)
        if optimizer is not None:
            optimizer.load_state(saved)
        return checkpoint

    # Writing

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        metric: float | None = None,
        files: Iterable[Path] = (),
        metric_name: str = METRIC,
        higher_is_better: bool = False,
    ) -> Path:
        """Write one checkpoint, then remove those that are neither best nor among the newest `keep`.

        `tensors` are groups of named tensors on any device, which may be views of one buffer; `state` is JSON; `best`
        compares `metric`; `files` are copied under their own names. Raises StorageError, for example on a full disk,
        and InputError for a state that is not JSON and a metric that is not a number; both leave everything as it was.
        A different checkpoint of the same step is moved to `superseded/`.
        """
        files = [Path(file) for file in files]
        target = self.directory / checkpoint_name(step)
        finite = _finite(metric)
        content: dict[str, Any] = {"version": VERSION, "step": index(step), "metric": finite, "state": dict(state)}
        if (metric_name, higher_is_better) != (METRIC, False):
            content |= {"metric_name": metric_name, "higher_is_better": higher_is_better}
        text = _as_json(content)
        with storage_errors(f"save checkpoint {target}"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        self.check_free_space(tensors)
        staging = self.directory / f".staging-{target.name}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        try:
            with storage_errors(f"save checkpoint {target}"):
                staging.mkdir()
                for group, named in tensors.items():
                    _write_tensors(staging / f"{_plain_name(group)}.safetensors", named)
                for file in files:
                    shutil.copyfile(file, staging / _plain_name(file.name))
                (staging / STATE).write_text(text, encoding="utf-8")
                manifest = _manifest_of(staging)
                if (target / MANIFEST).is_file() and (target / MANIFEST).read_bytes() == manifest:
                    shutil.rmtree(staging)
                    return target
                for path in staging.iterdir():
                    sync_file(path)
                (staging / MANIFEST).write_bytes(manifest)
                sync_file(staging / MANIFEST)
                sync_directory(staging)
                if target.exists():
                    self._set_aside(target)
                staging.rename(target)
                sync_directory(self.directory)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._remove_unneeded()
        return target

    def check_free_space(self, tensors: Mapping[str, Mapping[str, Tensor]], copies: int = 1) -> None:
        """Raise StorageError unless `copies` checkpoints of these tensors fit on the disk now."""
        needed = copies * (
            _ROOM_FOR_SMALL_FILES
            + sum(tensor.numel() * tensor.element_size() for named in tensors.values() for tensor in named.values())
        )
        existing = next(
            path for path in (self.directory.absolute(), *self.directory.absolute().parents) if path.exists()
        )
        with storage_errors(f"read the free space of {existing}"):
            free = shutil.disk_usage(existing).free
        if free < needed:
            raise StorageError(
                f"a checkpoint in {self.directory} needs {needed / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free: "
                "free some space, or run somewhere else"
            )

    def set_aside_after(self, step: int) -> Paths:
        """Move checkpoints after `step` to `superseded/`, when a run resumes from an older one.

        Otherwise `latest` would be a checkpoint of the abandoned steps.
        """
        beyond = [path for path in reversed(self.list()) if step_of(path) > step]  # newest first: a kill leaves no gap
        with storage_errors(f"set checkpoints aside in {self.directory}"):
            return [self._set_aside(path) for path in beyond]

    def _set_aside(self, path: Path) -> Path:
        aside = self.directory / SUPERSEDED / path.name
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            self._remove(aside)
        path.rename(aside)
        sync_directory(aside.parent)
        sync_directory(self.directory)
        return aside

    def _remove_unneeded(self) -> None:
        """Remove checkpoints that need not be kept; a failure is ignored, since it costs only space."""
        if self.keep is None:
            return
        paths = self.list()
        needed = {*paths[-self.keep :], self.best()}
        for path in paths:
            if path not in needed:
                with suppress(OSError):
                    self._remove(path)

    def _remove(self, path: Path) -> None:
        # Rename first: a half-removed directory must never look like a checkpoint.
        hidden = self.directory / f".staging-step-0-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Remove staging directories of dead processes, and of this process, which is not saving now."""
        for path in self.directory.glob(".staging-*"):
            match = _STAGING.fullmatch(path.name)
            if match and (int(match[1]) == os.getpid() or not process_is_alive(int(match[1]))):
                shutil.rmtree(path, ignore_errors=True)


def _check_restorable(model: object, optimizer: object) -> None:
    if isinstance(model, type) or not hasattr(model, "restore") or not hasattr(model, "tensors_and_state"):
        raise InputError(
            f"model is a {type(model).__name__}; expected a wrapper such as CustomTransformerWrapper. Put a network "
            "into one, or save tensors of any kind with `save`."
        )
    if optimizer is not None and not hasattr(optimizer, "state_views"):
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}; expected what `model.network.adamw` or `sgd` returned. Save "
            "tensors of any kind with `save`."
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _finite(metric: float | None) -> float | None:
    """The metric; None if there is none or it is not finite."""
    if metric is None:
        return None
    try:
        number = float(metric)
    except (TypeError, ValueError, RuntimeError) as error:  # the last one is torch's, of several elements
        raise InputError(f"metric={metric!r:.80}: expected one number, or a tensor of one element") from error
    return number if math.isfinite(number) else None


def _as_json(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"state is not JSON ({error}); expected numbers, text, None, and lists and mappings of these. A number in "
            "a tensor is tensor.item()."
        ) from error


def checkpoint_name(step: int) -> str:
    try:
        completed = index(step)  # of numpy and torch, too
    except TypeError:
        completed = -1
    if completed < 0:
        raise CheckpointError(f"step={step!r}: a checkpoint counts completed optimizer steps, a whole number from 0 on")
    return f"step-{completed:06d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint: expected step-NNNNNN, as in step-000100")
    return int(match[1])


def verify(path: Path) -> None:
    """Raise CheckpointError, which names the file, unless the directory matches its manifest exactly.

    A second call before the checkpoint is loaded reads nothing, as long as the files' status is the same.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}: expected a directory step-NNNNNN")
    try:
        key, status, now = path.resolve(), _status_of(path), time.time()
        if _verified.pop(key, None) == status:
            _verified[key] = status
            return
        _compare(path)
        # the status before reading; only if it is old enough for a later change to show in the files' times
        if all(changed < (now - SETTLED) * 1e9 for *_, changed in status.values()):
            _verified[key] = status
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _status_of(path: Path) -> FileStatus:
    return {
        entry.name: ((file := entry.lstat()).st_dev, file.st_ino, file.st_mode, file.st_size, file.st_ctime_ns)
        for entry in path.iterdir()
    }


def _compare(path: Path) -> None:
    """Compare every file with the manifest. Raises CheckpointError and OSError."""
    expected = _read_manifest(path)
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if unknown := sorted(present - set(expected)):
        raise CheckpointError(f"{path / unknown[0]} is not in the checkpoint's manifest: it was added later")
    if absent := sorted(set(expected) - present):
        raise CheckpointError(f"{path / absent[0]} is missing: the checkpoint's manifest lists it")
    for name, entry in expected.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file} is damaged: expected a plain file")
        size = file.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{file} is damaged: it has {size} bytes, its manifest says {entry['size']}")
        if file_digest(file) != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its content is not what was saved (SHA-256 differs)")


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and read one checkpoint directory at any place. Raises CheckpointError."""
    verify(path)
    _verified.pop(path.resolve(), None)  # the next load verifies again
    state = read_state(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            tensors[file.stem] = load_file(file, device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
    metric_name = str(state.get("metric_name", METRIC))
    return Checkpoint(path, state["step"], state["metric"], tensors, state["state"], metric_name)


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json: {"version", "step", "metric", "state"}. It does not verify the checkpoint. Raises
    CheckpointError."""
    content = _read_json(path / STATE)
    step = content.get("step")
    metric = content.get("metric")
    if content.get("version") != VERSION or not isinstance(step, int) or not isinstance(content.get("state"), dict):
        raise CheckpointError(f"{path / STATE} is not the state of a checkpoint of version {VERSION}")
    if metric is not None and not isinstance(metric, float):
        raise CheckpointError(f"{path / STATE} is damaged: its metric is {metric!r}, expected a number or null")
    if path.name != checkpoint_name(step):
        raise CheckpointError(f"{path} holds the checkpoint of step {step}: it was renamed to another step")
    return content


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    file = path / MANIFEST
    content = _read_json(file)
    # The manifest has no checksum itself: it must be, byte for byte, what we would write.
    if file.read_bytes() != _as_bytes(content):
        raise CheckpointError(f"{file} is damaged: it is not as it was written")
    files = content.get("files")
    if content.get("version") != VERSION or set(content) != {"version", "files"} or not isinstance(files, dict):
        raise CheckpointError(f"{file} is not the manifest of a checkpoint of version {VERSION}")
    for name, entry in files.items():
        if name != Path(name).name or not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise CheckpointError(f"{file} is damaged: its entry {name!r} is not a file's name, size and SHA-256")
    if STATE not in files:
        raise CheckpointError(f"{file} is damaged or foreign: it lists no {STATE}")
    return files


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file, f"{file} is missing: this is not a complete checkpoint", CheckpointError)


def _manifest_of(directory: Path) -> bytes:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(directory.iterdir())
    }
    return _as_bytes({"version": VERSION, "files": files})


def _as_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _plain_name(name: str) -> str:
    if name in {"", ".", "..", MANIFEST, STATE} or name != Path(name).name:
        raise CheckpointError(f"{name!r} cannot be a file of a checkpoint: expected a plain name that is not taken")
    return name


def _write_tensors(file: Path, named: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(_without_overlap(named), file)
    except SafetensorError as error:  # its only way to report a full disk
        raise StorageError(f"cannot write {file}: {error}") from error


def _without_overlap(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU without shared bytes: overlapping views of a buffer are copied, disjoint ones are not."""
    ready: dict[str, Tensor] = {}
    end_of_last = -1
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in named.items()}
    for name, tensor in sorted(on_cpu.items(), key=lambda item: item[1].data_ptr()):
        overlaps = tensor.data_ptr() < end_of_last
        end_of_last = max(end_of_last, tensor.data_ptr() + tensor.numel() * tensor.element_size())
        ready[name] = tensor.clone() if overlaps else tensor
    return {name: ready[name] for name in named}
