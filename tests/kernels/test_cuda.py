"""What can be proved of a step on a GPU without one: fake tensors on the device cuda (fake_cuda.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import Calls, fake_gpu
from launches import launches

from manual_backprop.common.batch import AnyBatch, Batch, EncoderBatch, PairBatch
from manual_backprop.config.network import ARCHITECTURES, PRECISIONS
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.kernels.cuda import attention, graph, triton
from manual_backprop.models.implementations import build_network
from manual_backprop.models.training_step import OfTensors, TrainingStep
from manual_backprop.ops import Visible
from manual_backprop.ops.numerics import float32_products
from manual_backprop.study.benchmark import rows
from manual_backprop.study.benchmark.ablations import ablated
from manual_backprop.study.benchmark.cases import CASES, SUBJECT
from manual_backprop.study.benchmark.gpu.optimizations import OPTIMIZATIONS

TINY: dict[str, Any] = {
    "vocab_size": 65,
    "d_model": 32,
    "n_blocks": 1,
    "n_heads": 4,
    "d_ffn": 48,
    "max_seq_len": 16,
    "device": "cuda",
    "kernels": "fused",
}


def batch_of(config: CustomTransformerConfig, rows: int = 2, segments: bool = False, first_row: int = 0) -> AnyBatch:
    tokens = torch.zeros(rows, config.max_seq_len, dtype=torch.int64, device="cuda")
    lengths = torch.zeros(rows, dtype=torch.int64, device="cuda")
    if config.network == "encoder":
        numbers = config.head_loss == "squared_error"
        targets = torch.zeros(rows, config.n_outputs, device="cuda") if numbers else lengths
        inputs = tokens if config.n_inputs is None else torch.zeros(rows, 16, config.n_inputs, device="cuda")
        return EncoderBatch(inputs, lengths, targets, first_row)
    if config.network == "encoder_decoder":
        return PairBatch(tokens, lengths, tokens, tokens, first_row=first_row)
    return Batch(tokens, tokens, torch.zeros_like(tokens) if segments else None, first_row)


def calls_of_a_step(
    config: CustomTransformerConfig, segments: bool = False, optimizer: str = "adamw", batches: int = 1
) -> list[Calls]:
    """Of two steps, as a graph makes them."""
    found = []
    with fake_gpu():
        network = build_network("custom", config)
        made = network.adamw(0.1, (0.9, 0.95), 1e-8) if optimizer == "adamw" else network.sgd(0.1, 0.9)
        step = TrainingStep(network, made, 1.0)
        given = [batch_of(config, 2, segments, 2 * batch) for batch in range(batches)]
        made.step(torch.zeros((), device="cuda"), 1e-3, 1.0)  # what an optimizer allocates once
        for number, count in ((1, 64), (2, 63)):
            recorded = OfTensors(step, given, network)
            inputs = recorded.inputs(network.on_device(count), 1e-3 / number, number)
            with Calls() as calls:
                loss, norm = recorded(*inputs)
            assert loss.device.type == norm.device.type == "cuda"
            found.append(calls)
    return found


def assert_capturable(calls: list[Calls]) -> None:
    first, second = calls
    assert first.waits == []
    assert first.elsewhere == []
    assert len(first.made) > 100
    # of the gradients: nothing is made before, as a rounded copy of the weights would be
    assert next(name for name, *_ in first.made if name != "aten.unbind.int") == "aten.zero_.default"
    assert first.made == second.made  # no number that a graph would keep, while it changes


TRITON, PYTORCH = {"compile": "always"}, {"compile": "never"}
NETWORKS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder_decoder": {"network": "encoder_decoder"},
    "classes": {"network": "encoder", "n_outputs": 3, "pooling": "first"},
    "numbers": {"network": "encoder", "n_outputs": 3, "n_inputs": 2, "head_loss": "squared_error"},
}
# Each option once, with another architecture, precision and kind of kernels.
OPTIONS: list[dict[str, Any]] = [
    TRITON | {"precision": "bf16_mixed"},
    PYTORCH | {"precision": "bf16_mixed", "dropout": 0.1, "label_smoothing": 0.1},
    TRITON | {"precision": "bf16", "architecture": "vaswani"},
    TRITON | {"precision": "fp16_mixed", "architecture": "llama", "n_kv_heads": 2},
    PYTORCH | {"precision": "fp32", "architecture": "llama", "n_kv_heads": 2},
    TRITON | {"precision": "tf32", "architecture": "llama", "dropout": 0.1, "recompute": "block"},
    TRITON | {"precision": "fp16_mixed", "activation": "relu", "positions": "none"},
    PYTORCH | {"precision": "fp64", "activation": "gelu", "positions": "sinusoidal"},
    TRITON | NETWORKS["encoder_decoder"] | {"precision": "bf16_mixed", "dropout": 0.1},
    PYTORCH | NETWORKS["encoder_decoder"] | {"architecture": "vaswani", "padding_token_id": 3, "label_smoothing": 0.1},
    TRITON | NETWORKS["encoder_decoder"] | {"precision": "bf16", "architecture": "llama", "n_kv_heads": 2},
    TRITON | NETWORKS["classes"] | {"precision": "fp16_mixed"},
    PYTORCH | NETWORKS["numbers"] | {"precision": "bf16"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_a_step_can_be_captured(options: dict[str, Any]) -> None:
    """Every tensor is on the device, nothing waits, no shape depends on a number, no number is frozen."""
    assert_capturable(calls_of_a_step(CustomTransformerConfig(TINY | options)))


@pytest.mark.nightly
@pytest.mark.parametrize("compile", ["always", "never"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_step_can_be_captured(network: str, architecture: str, precision: str, compile: str) -> None:
    options = {"architecture": architecture, "precision": precision, "compile": compile, "dropout": 0.1}
    assert_capturable(calls_of_a_step(CustomTransformerConfig(TINY | NETWORKS[network] | options), batches=2))


def test_documents_several_batches_and_another_optimizer() -> None:
    config = CustomTransformerConfig(TINY | {"precision": "bf16_mixed"})
    assert_capturable(calls_of_a_step(config, segments=True, optimizer="sgd", batches=2))
    assert_capturable(calls_of_a_step(replace(config, kernels="reference")))


def test_where_cudnn_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step can be captured with its attention, too; and what it does not take, flash attention does."""
    monkeypatch.setattr(attention, "_has_fast_cudnn", lambda device: True)
    calls = calls_of_a_step(CustomTransformerConfig(TINY | {"precision": "bf16_mixed"}))
    assert_capturable(calls)
    made = [name for name, *_ in calls[0].made]
    for way in ("", "_backward"):
        assert made.count(f"aten._scaled_dot_product_cudnn_attention{way}.default") == 1
    for keys, heads, width, kind in (
        (5, 4, 64, "cudnn"),
        (1, 4, 64, "flash"),
        (5, 2, 64, "flash"),
        (5, 4, 136, "flash"),
    ):
        query, key = (torch.empty(2, T, H, width, dtype=torch.bfloat16) for T, H in ((5, 4), (keys, heads)))
        assert attention._choose(query, key, Visible(causal=False), None) == (kind, ""), (keys, heads, width)


def test_which_attention_an_older_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention needs Ampere; its backward for the widest heads more shared memory than a card for games has."""
    expected = [((7, 5), 64, "efficient"), ((8, 0), 256, "flash"), ((8, 6), 192, "flash"), ((8, 6), 224, None)]
    for capability, width, kind in expected:
        monkeypatch.setattr(attention, "_capability", lambda device, capability=capability: capability)
        query = torch.empty(2, 5, 4, width, dtype=torch.float16)
        assert attention._choose(query, query, Visible(), None)[0] == kind, (capability, width)


def test_tf32_is_set_around_a_calculation() -> None:
    """In a way that torch.compile can read, which fails where it finds PyTorch's two settings apart."""
    settings = torch.backends.cuda.matmul
    with float32_products("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        assert settings.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "highest"
    assert settings.fp32_precision != "tf32"


@pytest.mark.parametrize("ends", [True, False], ids=["too little memory", "a call that waits"])
def test_a_step_that_cannot_be_captured_runs_as_it_is(
    ends: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And leaves PyTorch as it was. Around a capture stands what `torch.cuda.graph` does there: where CUDA refuses to
    end it, an error of its own, another stream, and an allocator that knows of no end."""
    usual, own = SimpleNamespace(device_index=0), SimpleNamespace(device_index=0, device=None)
    cuda = SimpleNamespace(stream=usual, captured=0, underway=[], released=[])

    @contextlib.contextmanager
    def capture(_: Any, pool: Any, stream: Any) -> Iterator[None]:
        cuda.stream, cuda.captured = stream, cuda.captured + 1
        cuda.underway.append(pool)
        try:
            yield
        finally:
            if not ends:
                raise RuntimeError("operation failed due to a previous error during capture")
            cuda.underway.remove(pool)
            cuda.stream = usual

    def end(device: int, pool: Any) -> None:
        if pool not in cuda.underway:
            raise RuntimeError("not currently recording to mempool_id")
        cuda.underway.remove(pool)

    def empty_cache() -> None:
        assert not cuda.underway, "captures_underway.empty() INTERNAL ASSERT FAILED"

    def work(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if cuda.stream is not usual:
            raise RuntimeError("not permitted when stream is capturing")
        return (2 * x,)

    for name, stand_in in (
        ("graph", capture),
        ("device", lambda device: contextlib.nullcontext()),
        ("CUDAGraph", object),
        ("Stream", lambda device: own),
        ("graph_pool_handle", lambda: "pool"),
        ("empty_cache", empty_cache),
        ("current_stream", lambda: cuda.stream),
        ("set_stream", partial(setattr, cuda, "stream")),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *what: cuda.released.append(what), raising=False)
    graphs = graph.Graphs()
    for number in range(graph.WARM_UP + 3):
        (doubled,) = graphs(work, [torch.tensor(number)], "step")
        assert doubled == 2 * number
    assert cuda.captured == 1
    assert (cuda.stream, cuda.underway) == (usual, [])
    assert cuda.released == ([] if ends else [(0, "pool")])
    (said,) = [record.message for record in caplog.records]
    assert said.endswith("waits for Python: not permitted when stream is capturing")
    assert graphs.refusal == "not permitted when stream is capturing"


def test_a_step_of_gpt2_has_few_launches() -> None:
    """124M parameters, T=1024, B=64, one batch: counted for one block and for two, which all others are like."""
    assert triton.installed(), "pip install -e '.[test]' brings Triton on Linux"
    sizes = {"vocab_size": 50257, "d_model": 768, "n_heads": 12, "d_ffn": 3072, "max_seq_len": 1024}
    counted = []
    for blocks in (1, 2):
        config = CustomTransformerConfig(TINY | sizes | {"n_blocks": blocks, "precision": "bf16_mixed"})
        with fake_gpu():
            network = build_network("custom", config)
            step = TrainingStep(network, network.adamw(0.1, (0.9, 0.95), 1e-8), 1.0)
            recorded = OfTensors(step, [batch_of(config, 64)], network)
            inputs = recorded.inputs(network.on_device(64 * 1024), 1e-3, 1)
            counted.append(launches(lambda recorded=recorded, inputs=inputs: recorded(*inputs)).total())
    one, two = counted
    assert one + 11 * (two - one) <= 450


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_a_graph_gives_the_bits_of_steps_as_they_are(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the same bits are promised at all (device.deterministic), on a real GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    found = []
    try:
        for graph in (False, True):
            network = build_network("custom", CustomTransformerConfig(TINY | options | {"compile": "always"}))
            step = TrainingStep(network, network.adamw(0.1, (0.9, 0.95), 1e-8), 1.0, graph)
            batch = batch_of(network.config)
            for number in range(1, 8):
                step([batch], 32, 1e-3 / number, number)
            assert (step.graphs is not None and bool(step.graphs.recorded)) == graph
            found.append(network.export_parameters())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(tensor, found[0][name]) for name, tensor in found[1].items())


def test_what_fused_attention_does_not_take_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for options, why in (
        ({"dropout": 0.1}, "its probabilities are dropped (model.dropout=0.1)"),
        ({"d_model": 20}, "a head of 5 is no multiple of 8"),
        ({"precision": "fp64"}, "no kernel takes float64"),
        (NETWORKS["classes"], "what is padded is masked"),
        ({"max_seq_len": 16}, "documents are masked (batching.mask_documents=false trains without)"),
    ):
        caplog.clear()
        config = CustomTransformerConfig(TINY | {"precision": "bf16_mixed"} | options)
        with fake_gpu():
            network = build_network("custom", config)
            for _ in range(2):
                network.loss_and_gradients(batch_of(config, segments="documents" in why), denominator=3, step=1)
        (said,) = [record.message for record in caplog.records if "than fused" in record.message]
        assert why in said


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda network: torch.as_tensor(3, device="cuda"), "elsewhere"),
        (lambda network: network.flat_parameters.buffer.cpu(), "elsewhere"),
        (lambda network: network.flat_parameters.buffer.nonzero(), "waits"),
        (lambda network: bool(network.flat_parameters.buffer.sum() > 0), "waits"),
    ],
    ids=["from the host", "to the host", "size", "number"],
)
def test_what_cannot_be_captured_is_seen(fault: Any, found: str) -> None:
    with fake_gpu():
        network = build_network("custom", CustomTransformerConfig(TINY))
        with Calls() as calls, contextlib.suppress(RuntimeError):
            fault(network)
    assert getattr(calls, found)


def test_each_optimization_can_be_left_out() -> None:
    """As `bench --gpu` does it: a step still runs, and makes other calls; without a graph the same ones."""
    case = CASES["G4"].case("G4", "bf16_mixed", threads=1, batch_size=2)
    case = replace(case, config=replace(case.config, n_blocks=1))
    counts = {}
    for name in ("all of them", *OPTIMIZATIONS):
        without = ablated(OPTIMIZATIONS[name]) if name in OPTIMIZATIONS else contextlib.nullcontext()
        with without, fake_gpu():
            trainer = rows.build(SUBJECT, case)
            batch = rows.random_batch(case, trainer.device)
            trainer.step(batch, 1.0)
            assert isinstance(trainer, rows.NetworkTrainer)
            assert (trainer.training_step.graphs is None) == (name == "graph")
            counts[name] = launches(partial(trainer.step, batch, 1.0)).total()
    assert [name for name, count in counts.items() if count <= counts["all of them"]] == ["all of them", "graph"]
