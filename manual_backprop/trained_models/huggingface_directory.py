"""A folder in the layout of `transformers`: config.json, safetensors in one file or several, and a tokenizer.

Our exports also have manual_backprop.json, with the record of the checkpoint (step, validation loss, config, digests)
and the digest of the weights. If the weights have changed since, the record is ignored. Recognizing a folder and
reading its config needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manual_backprop.common.digests import file_digest
from manual_backprop.common.errors import InputError
from manual_backprop.common.json_files import read_object
from manual_backprop.common.uris import expanded
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models.huggingface.layouts import network_of

if TYPE_CHECKING:
    from torch import Tensor

    from manual_backprop.checkpoints.checkpoint import Checkpoint

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
RECORD = "manual_backprop.json"
RECORD_VERSION = 1
DOWNLOADED = [CONFIG, "*.safetensors", INDEX, *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
WITHOUT_HUB = (
    "Go online once (HF_HUB_OFFLINE must not be set), or download it where there is a network, with `hf download "
    "{name} --local-dir FOLDER`, and give a copy of that folder here."
)


@dataclass(frozen=True)
class Imported:
    config: CustomTransformerConfig
    parameters: dict[str, Tensor]
    remarks: list[str]  # sentences about what was converted


def is_exported(folder: Path) -> bool:
    """Whether this is a folder in the layout of `transformers`."""
    return (folder / CONFIG).is_file() and ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file())


def local_folder(which: str) -> Path:
    """The local folder `which`, or the model of that name downloaded from the hub. Raises InputError."""
    path = expanded(which)
    if path.is_file():
        raise InputError(f"{which} is a file: give the folder that holds {CONFIG} and {WEIGHTS}")
    if path.is_dir():
        return path
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(which)
    except HFValidationError as error:
        raise InputError(
            f"there is no folder {which!r}, and it is not the name of a model on the hub (OWNER/NAME)"
        ) from error
    return _downloaded(which)


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    from manual_backprop.data.sources.hub import hub_download

    missing = (
        f"{name} is not a folder here; as a model of the hub it was not downloaded before, and the hub cannot be "
        f"reached. {WITHOUT_HUB.format(name=name)}"
    )
    failed = f"{name} is not a folder here, and cannot be downloaded from the hub:"
    with hub_download(missing, failed, " If it is yours or gated, log in with `hf auth login`."):
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED, ignore_patterns=["*/*"]))


def read_network(folder: Path) -> CustomTransformerConfig:
    """The network's config, without reading the weights. Raises InputError."""
    return network_of(read_object(folder / CONFIG), str(folder / CONFIG))


def read_model(folder: Path) -> Imported:
    """The network and its parameters. Raises InputError with everything that does not fit."""
    config = read_network(folder)  # before gigabytes of weights are read
    from manual_backprop.models.huggingface.weights import to_ours

    theirs = _read_weights(folder)
    precision, remarks = _precision_of(theirs)
    config = replace(config, precision=precision)
    dtype = config.get_dtype()
    parameters = {name: tensor.to(dtype) for name, tensor in to_ours(theirs, config, str(folder)).items()}
    return Imported(config, parameters, remarks)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors |= load_file(file, device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as safetensors: {error}") from error
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The file of weights, or those in the index. Raises InputError if there are none, or only pickles."""
    if not (folder / CONFIG).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"{folder} holds no {CONFIG}, so it is not a model of transformers; it holds {there}")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_object(folder / INDEX).get("weight_map")
        names = sorted(set(map(str, places.values()))) if isinstance(places, Mapping) else []
        wrong = [name for name in names if name != Path(name).name or not (folder / name).is_file()]
        if wrong or not names:
            raise InputError(f"{folder / INDEX} names {', '.join(wrong) or 'no file'}, which is not in the folder")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} has its weights only as a pickle ({pickles[0]}), and reading a pickle runs the code in it. If "
            "you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of transformers "
            f"writes {WEIGHTS}; give that folder."
        )
    raise InputError(f"{folder} holds no {WEIGHTS} and no {INDEX}")


def _precision_of(tensors: Mapping[str, Tensor]) -> tuple[str, list[str]]:
    import torch

    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if dtypes == {torch.bfloat16}:
        return "bf16", []
    if torch.float64 in dtypes:
        return "fp64", []
    others = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32})
    return "fp32", [f"weights in {', '.join(others)} become fp32, which holds them exactly"] if others else []


# Our record in an export


def as_checkpoint(folder: Path) -> Checkpoint:
    """The model in a folder as a checkpoint. Raises InputError."""
    from manual_backprop.checkpoints.checkpoint import Checkpoint

    imported, record = read_model(folder), _record_of(folder)
    state = dict(record.get("state", {}))
    saved = state.get("network")
    state["network"] = asdict(imported.config)
    if isinstance(saved, Mapping):  # settings of training, which config.json does not have
        state["network"] |= {key: saved[key] for key in ("dropout", "label_smoothing", "seed") if key in saved}
    step, metric = record.get("step", 0), record.get("metric")
    return Checkpoint(folder, step, metric, {"parameters": imported.parameters}, state)


def _record_of(folder: Path) -> dict[str, Any]:
    """The record of the checkpoint; empty if there is none, or if the weights have changed since."""
    if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
        return {}
    record = read_object(folder / RECORD)
    valid = (
        record.get("version") == RECORD_VERSION
        and isinstance(record.get("step"), int)
        and isinstance(record.get("metric"), float | None)
        and isinstance(record.get("state"), dict)
        and record.get("weights_sha256") == file_digest(folder / WEIGHTS)
    )
    return record if valid else {}
