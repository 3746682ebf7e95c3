"""Batches as `transformers` has them: mappings with `input_ids`, `labels` and perhaps an `attention_mask`.

What its data collators return, and what `datasets` gives row by row. What the three mean depends on the model that
reads them, as in `transformers`; a row by itself is a batch of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.batch import IGNORED, AnyBatch
from ...common.errors import InputError
from .encoder import EncoderWrapper
from .encoder_decoder import EncoderDecoderWrapper
from .language_model import LanguageModel
from .wrapper import NetworkWrapper

CHANGES_THE_RESULT = ("inputs_embeds", "position_ids")  # and nothing here reads it


def batch_of(model: NetworkWrapper, given: Mapping[str, Any]) -> AnyBatch:
    """What `model` reads of a mapping, checked, on the model's device. Values are tensors, arrays or lists of whole
    numbers. Keys that are not named here are left alone.

    A decoder: input_ids and labels (B, T), usually the same, shifted inside. An encoder-decoder: input_ids (B, S) are
    the source and labels (B, T) the target, without its beginning; an end token there is optional. An encoder of
    classes: input_ids (B, T), labels (B,). A label of -100 does not count. attention_mask, of the shape of input_ids,
    is 1 for real tokens and 0 for padding, which stands on the right of what an encoder reads.

    Raises InputError for what is missing or does not fit.
    """
    if unread := [name for name in CHANGES_THE_RESULT if given.get(name) is not None]:
        raise InputError(f"The batch has {' and '.join(unread)}, which is not read here: leave it out.")
    for name in ("input_ids", "labels"):
        if given.get(name) is None:
            raise InputError(
                f"The batch has no {name}, only {', '.join(map(str, given)) or 'nothing'}: expected input_ids and "
                "labels, which for a decoder are usually the same."
            )
    input_ids = _rows("input_ids", given["input_ids"])
    mask = None if given.get("attention_mask") is None else _rows("attention_mask", given["attention_mask"])
    if mask is not None and mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected that of input_ids, {tuple(input_ids.shape)}."
        )
    if isinstance(model, LanguageModel):
        return model.batch(input_ids, _rows("labels", given["labels"]), mask)
    lengths = None if mask is None else _lengths("attention_mask", mask != 0)
    if isinstance(model, EncoderDecoderWrapper):
        target, target_lengths = _target(model, _rows("labels", given["labels"]))
        return model.batch(input_ids, target, lengths, target_lengths)
    assert isinstance(model, EncoderWrapper)
    if model.config.n_inputs is not None or model.config.predicts_numbers:
        raise InputError("This encoder reads or predicts numbers, which no mapping has: give it an EncoderBatch.")
    return model.batch(input_ids, _tensor("labels", given["labels"]).reshape(-1), lengths)


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        way_out = f"pad them as a data collator does, labels with {IGNORED}"
        if isinstance(value, Sequence) and any(isinstance(one, Tensor) for one in value):
            way_out = "give the DataLoader a data collator as its collate_fn; its own one makes a tensor of each column"
        raise InputError(f"{name} is {value!r:.80}; expected a tensor or lists of equal length: {way_out}.") from error
    if tensor.is_floating_point() or tensor.is_complex():
        raise InputError(f"{name} is {tensor.dtype}; expected whole numbers.")
    return tensor.long()


def _rows(name: str, value: Any) -> Tensor:
    """(B, T), of (T,) too."""
    tensor = _tensor(name, value)
    if tensor.dim() == 1:
        tensor = tensor[None]
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected (batch, sequence), both at least 1.")
    return tensor


def _lengths(name: str, real: Tensor) -> Tensor:
    """real (B, T) -> lengths (B,): the real positions of each row. Raises InputError unless they come first."""
    lengths = real.sum(1)
    if bool((real != (torch.arange(real.shape[1], device=real.device) < lengths[:, None])).any()):
        raise InputError(
            f"{name} has padding before or between tokens; expected it on the right: padding_side='right'."
        )
    return lengths


def _target(model: EncoderDecoderWrapper, labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (B, T) -> the same without the end token, which the model puts there by itself, and their lengths."""
    lengths = _lengths(f"labels, where {IGNORED} is padding,", labels != IGNORED)
    last = labels.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]  # (B,)
    return labels, lengths - ((lengths > 0) & (last == model.eos_token_id)).long()
