"""An Evaluator reads batches as `transformers` has them: mappings of input_ids, labels and attention_mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from manual_backprop import CustomTransformerWrapper, EncoderDecoderWrapper, EncoderWrapper, Evaluator
from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import ConfigError, InputError

V = 13
SIZES: dict[str, Any] = {"vocab_size": V, "d_model": 8, "n_blocks": 1, "n_heads": 2, "d_ffn": 8, "max_seq_len": 6}
ROWS = [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [9, 10, 11, 12, 0]]  # 0 is padding
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
LABELS = [[1, 2, 3, 4, 5], [6, 7, 8, -100, -100], [9, -100, 11, 12, -100]]


def lively(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.network.parameters.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.fixture(scope="module")
def model() -> CustomTransformerWrapper:
    return lively(CustomTransformerWrapper(**SIZES, precision="fp64"))


def test_of_several_batches_each_label_counts_once(model: CustomTransformerWrapper) -> None:
    """The mean over the labels that count, with the model's own loss of each row without its padding."""
    total, count = 0.0, 0
    for row, mask, labels in zip(ROWS, MASK, LABELS, strict=True):
        length, counted = sum(mask), sum(label != -100 for label in labels[1:])
        loss = model.forward(torch.tensor([row[:length]]), labels=torch.tensor([labels[:length]]))["loss"]
        assert loss is not None
        total, count = total + loss.item() * counted, count + counted
    batches = [
        {"input_ids": ROWS[part], "labels": LABELS[part], "attention_mask": MASK[part], "length": 5}
        for part in (slice(0, 1), slice(1, 3))
    ]
    found = Evaluator(model).evaluate(iter(batches))
    assert found.tokens == count == 8
    assert found.loss == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("made", [torch.tensor, np.array, list], ids=["tensors", "arrays", "lists"])
def test_the_same_from_whatever_holds_numbers(model: CustomTransformerWrapper, made: Any) -> None:
    ids = torch.tensor(ROWS[:1])
    targets = torch.tensor([[2, 3, 4, 5, -100]])
    want = Evaluator(model).evaluate([Batch(ids, targets)])
    batch = {"input_ids": made(ROWS[:1]), "labels": made(LABELS[:1])}
    row = {name: value[0] for name, value in batch.items()}  # as a dataset gives it
    assert Evaluator(model).evaluate([batch]) == want
    assert Evaluator(model.network).evaluate(row for row in [row]) == want
    assert Evaluator(model, device="cpu").evaluate([batch]) == want


def test_a_data_collator_of_transformers(model: CustomTransformerWrapper) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(number): number for number in range(V)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
    rows = [{"input_ids": row[: sum(mask)]} for row, mask in zip(ROWS, MASK, strict=True)]
    loader = DataLoader(rows, 2, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))  # type: ignore[arg-type]
    found = Evaluator(model).evaluate(loader)
    alone = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    full = [{"input_ids": row, "labels": row} for row in ROWS]
    with pytest.raises(
        InputError, match=r"input_ids is \[tensor.*give the DataLoader a data collator as its collate_fn"
    ):
        Evaluator(model).evaluate(DataLoader(full, 2))  # type: ignore[arg-type]
    want = Evaluator(model).evaluate(alone)
    assert found.tokens == want.tokens == 4 + 2 + 3
    assert found.loss == pytest.approx(want.loss, rel=1e-12)


def test_an_encoder_decoder_reads_source_and_target() -> None:
    model = lively(EncoderDecoderWrapper(**SIZES, precision="fp64"))
    want = model.forward([[1, 2, 3], [4, 5]], [[3, 2], [5, 4, 1]])["loss"].item()
    source = {"input_ids": [[1, 2, 3], [4, 5, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
    for labels in ([[3, 2, -100], [5, 4, 1]], [[3, 2, 12, -100], [5, 4, 1, 12]]):  # 12 is the end
        found = Evaluator(model).evaluate([source | {"labels": labels}])
        assert found.tokens == 3 + 4
        assert found.loss == pytest.approx(want, rel=1e-12)


def test_an_encoder_reads_classes() -> None:
    model = lively(EncoderWrapper(**SIZES, n_outputs=3, precision="fp64"))
    batch = {"input_ids": [[1, 2, 3], [4, 5, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]], "labels": [2, -100]}
    want = -model.predict([[1, 2, 3]]).log_softmax(-1)[0, 2].item()
    found = Evaluator(model).evaluate([batch])
    assert found.tokens == 1
    assert found.loss == pytest.approx(want, rel=1e-12)


IDS = {"input_ids": [[1, 2, 3]]}


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        (IDS, "batches is a dict; expected several batches: put one into a list"),
        (3, "batches is a int; expected several batches"),
        ([[1, 2, 3]], "A batch is a list; expected a mapping with input_ids and labels, or a Batch"),
        ([IDS], "The batch has no labels, only input_ids"),
        ([{}], "The batch has no input_ids, only nothing"),
        ([{"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}], "expected a tensor or lists of equal length"),
        ([IDS | {"labels": [[1.0, 2.0, 3.0]]}], r"labels is torch.float32; expected whole numbers"),
        ([IDS | {"labels": [[1, 2]]}], r"labels has shape \(1, 2\); expected that of input_ids, \(1, 3\)"),
        ([IDS | {"labels": [[1, 2, 99]]}], "The label 99 at"),
        ([IDS | {"labels": [[1, 2, 3]], "attention_mask": [[1]]}], r"attention_mask has shape \(1, 1\)"),
        ([IDS | {"labels": [[1, 2, 3]], "position_ids": [[0, 1, 2]]}], "position_ids, which is not read here"),
        ([{"input_ids": [[[1]]], "labels": [[1]]}], r"input_ids has shape \(1, 1, 1\); expected \(batch, sequence\)"),
    ],
)
def test_what_cannot_be_read_is_named(model: CustomTransformerWrapper, batches: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Evaluator(model).evaluate(batches)


def test_padding_on_the_left_is_refused_where_lengths_count() -> None:
    model = EncoderWrapper(**SIZES, n_outputs=3)
    batch = {"input_ids": [[0, 1]], "attention_mask": [[0, 1]], "labels": [2]}
    with pytest.raises(InputError, match="attention_mask has padding before or between tokens"):
        Evaluator(model).evaluate([batch])
    with pytest.raises(InputError, match="give the Evaluator the wrapper around it"):
        Evaluator(model.network).evaluate([batch])
    numbers = EncoderWrapper(n_inputs=2, n_outputs=1, head_loss="squared_error", **SIZES)
    with pytest.raises(InputError, match="give it an EncoderBatch"):
        Evaluator(numbers).evaluate([{"input_ids": [[1, 2]], "labels": [1]}])
    with pytest.raises(InputError, match="The targets are numbers"):
        Evaluator(numbers).evaluate([numbers.batch(torch.ones(1, 3, 2), [[0.5]], None)])


def test_a_model_and_a_device_that_cannot_be_are_refused(model: CustomTransformerWrapper) -> None:
    with pytest.raises(InputError, match="model is a Linear; expected a network such as CustomTransformer"):
        Evaluator(torch.nn.Linear(2, 2))
    for nothing in (0, -1.5, float("nan")):
        with pytest.raises(InputError, match=f"bytes_per_token={nothing}: expected the bytes of the text"):
            Evaluator(model, bytes_per_token=nothing)
    with pytest.raises(ConfigError, match="device='mps': must be auto, cpu, cuda"):
        Evaluator(model, device="mps")
    with pytest.raises(ConfigError, match=r"device=cuda:99: PyTorch sees \d+ GPUs here"):
        Evaluator(model, device="cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_another_device_it_is_the_model_as_it_is_now(model: CustomTransformerWrapper) -> None:
    evaluator, batch = Evaluator(model, device="cuda"), {"input_ids": ROWS, "labels": LABELS, "attention_mask": MASK}
    model.train_step(torch.tensor(ROWS), torch.tensor(LABELS), learning_rate=0.1)
    assert evaluator.evaluate([batch]).loss == pytest.approx(Evaluator(model).evaluate([batch]).loss, rel=1e-9)
