"""Checks that this machine has what a run needs: files, a run to resume, a GPU. Needs no torch."""

import os
from pathlib import Path

from manual_backprop.common.errors import InputError
from manual_backprop.common.machine import compute_capabilities
from manual_backprop.common.uris import expanded
from manual_backprop.config.rules import shown
from manual_backprop.config.schema import WITH_FORMAT, DatasetConfig, RunConfig


def _paths_of(dataset: DatasetConfig) -> dict[str, str | None]:
    """The keys of a dataset that are paths; for two parallel files with a common prefix, the path of the sources."""
    if dataset.format == "hub":
        return {"dataset.path": None}
    keys = ("path",) if dataset.format == "saved" else ("path", "validation", "test")
    given = {f"dataset.{key}": getattr(dataset, key) for key in keys}
    ending = dataset.source_column or "source"
    return {
        key: f"{path}.{ending}" if dataset.format == "lines" or os.path.isfile(f"{path}.{ending}") else path
        for key, path in given.items()
        if isinstance(path, str)
    }


def missing_here(config: RunConfig) -> list[str]:
    """A sentence for each missing thing, for a run that starts in the working directory."""
    violations = []
    paths = {"dataset.path": config.dataset.path, "tokenizer.path": config.tokenizer.path}
    if config.dataset.name in ("text", "jsonl", "parquet"):
        paths["dataset.test"] = config.dataset.test  # for other formats it is the name of a split
    if config.dataset.name in WITH_FORMAT:
        paths |= _paths_of(config.dataset)
    paths["tokenizer.source_path"] = config.tokenizer.source_path
    for key, path in paths.items():
        if path is not None and not (os.path.isfile(place := expanded(path)) or os.path.isdir(place)):
            hub = "; a dataset of the hub needs dataset.format=hub" * (key == "dataset.path" and path.count("/") == 1)
            hub *= config.dataset.name in WITH_FORMAT
            violations.append(
                f"{key}={shown(path)}: there is no such file or folder (working directory: {Path.cwd()}){hub}"
            )
    if config.resume not in (None, "last", "best"):  # these two need the checkpoints, which the run itself reads
        from manual_backprop.tracking.run_directory import find_run

        try:
            find_run(Path("outputs"), str(config.resume))
        except InputError as error:
            violations.append(f"resume={shown(config.resume)}: {' '.join(str(error).split())}")
    if config.device.name == "cuda":
        capabilities = compute_capabilities()
        if not capabilities:
            violations.append(
                "device=cuda: no NVIDIA GPU can be used on this machine; use device=cpu, or device=auto for a GPU "
                "if there is one"
            )
        elif (index := config.device.index or 0) >= len(capabilities):
            count = len(capabilities)
            violations.append(
                f"device.index={index}: this machine has {count} GPU{'s' * (count > 1)}; use 0"
                + f" to {count - 1}" * (count > 1)
            )
        elif (name := config.precision.name) in ("bf16", "bf16_mixed", "tf32") and capabilities[index] < (8, 0):
            major, minor = capabilities[index]
            violations.append(
                f"precision={name}: this GPU (compute capability {major}.{minor}) has no "
                f"{'TF32' if name == 'tf32' else 'bfloat16'}, which needs 8.0 or more; use precision=fp16_mixed or fp32"
            )
    elif config.precision.name == "tf32" and not compute_capabilities():
        violations.append("precision=tf32: only an NVIDIA GPU has it, and there is none here; use precision=fp32")
    return violations
