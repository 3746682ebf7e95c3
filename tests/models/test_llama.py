"""The hand-written llama equals that of `transformers`; and what its config refuses."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from manual_backprop import CustomTransformer, CustomTransformerConfig
from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import ConfigError
from manual_backprop.models.network import parameter_shapes
from manual_backprop.ops.normalization import EPSILON
from manual_backprop.ops.rms_normalization import RMS_EPSILON
from manual_backprop.ops.rotary_attention import BASE
from manual_backprop.study.gradient_check.measure import AUTOGRAD_BAR, error_of, errors_of
from manual_backprop.study.gradient_check.network_check import set_proof_scale
from manual_backprop.training.command_line import check

THEIRS = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.hidden": "mlp.up_proj",
    "feed_forward.output": "mlp.down_proj",
    "token_embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}


def their_name(name: str) -> str:
    place = name.removesuffix(".weight")
    if not place.startswith("blocks."):
        return f"{THEIRS[place]}.weight"
    _, block, inner = place.split(".", 2)
    return f"model.layers.{block}.{THEIRS[inner]}.weight"


def config_of(**changes: object) -> CustomTransformerConfig:
    sizes: dict = {"vocab_size": 37, "d_model": 24, "n_blocks": 3, "n_heads": 4, "d_ffn": 52, "max_seq_len": 16}
    return CustomTransformerConfig(**(sizes | {"architecture": "llama", "precision": "fp64"} | changes))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_logits_and_gradients_are_those_of_transformers(n_kv_heads: int) -> None:
    """In float64, to 1e-12. The norms of `transformers` round to float32 in every dtype, so torch's RMSNorm with the
    same weights replaces them. Its loss is float32, so the loss is computed from its logits.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = config_of(n_kv_heads=n_kv_heads)
    network = CustomTransformer(config)
    set_proof_scale(network)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ffn,
            num_hidden_layers=config.n_blocks,
            num_attention_heads=config.n_heads,
            num_key_value_heads=n_kv_heads,
            max_position_embeddings=config.max_seq_len,
        )
    ).double()
    assert theirs.config.rms_norm_eps == RMS_EPSILON
    theirs.load_state_dict({their_name(name): tensor for name, tensor in network.parameters.items()})
    for module in list(theirs.modules()):
        for name, inner in list(module.named_children()):
            if type(inner).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(config.d_model, eps=RMS_EPSILON)
                norm.weight = inner.weight
                setattr(module, name, norm)
    tokens, targets = torch.randint(37, (2, 2, 13), generator=torch.Generator().manual_seed(0))
    logits = theirs(tokens).logits
    assert error_of(network.predict(tokens), logits.detach()) <= AUTOGRAD_BAR
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    want.backward()
    loss = network.loss_and_gradients(Batch(tokens, targets), denominator=26, step=None)
    assert error_of(loss, want.detach()) <= AUTOGRAD_BAR
    gradients = {name: theirs.get_parameter(their_name(name)).grad for name in network.gradients}
    assert max(errors_of(network.gradients, gradients).values()) <= AUTOGRAD_BAR


def test_scores_depend_on_distances_alone() -> None:
    """The same words later in the window give the same logits if nothing before them is visible."""
    network = CustomTransformer(config_of(n_kv_heads=2))
    set_proof_scale(network)
    words = torch.tensor([[3, 1, 4, 1, 5, 9]])
    before = torch.tensor([[2, 6, 5, 3]])
    segments = torch.tensor([[0] * 4 + [1] * 6])
    later = network.predict(torch.cat((before, words), 1), segments)[:, 4:]
    # the angles are float32, whose rounding is all that differs
    torch.testing.assert_close(later, network.predict(words), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(network.predict(words.flip(1)).flip(1), network.predict(words), rtol=0.1)


def test_parameters_have_no_biases_and_narrower_keys() -> None:
    shapes = parameter_shapes(config_of(n_kv_heads=2, n_blocks=1))
    assert not [name for name in shapes if name.endswith("bias")]
    place = "blocks.0.attention."
    assert [shapes[f"{place}{name}.weight"] for name in ("query", "key", "value", "output")] == [
        *((24, 24), (12, 24), (12, 24), (24, 24))
    ]
    assert shapes["blocks.0.feed_forward.gate.weight"] == shapes["blocks.0.feed_forward.hidden.weight"] == (52, 24)
    assert shapes["head.weight"] == (37, 24)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("architecture=llama", "model.n_kv_heads=3"), "model.n_kv_heads=3: must divide n_heads=4"),
        (("architecture=llama", "architecture.activation=relu"), "architecture.activation=relu: .* supports swiglu"),
        (("model.n_kv_heads=2",), "model.n_kv_heads=2: architecture=gpt2 has as many as"),
        (("architecture=llama", "model.n_heads=128"), "model.d_model=128: .* needs an even width"),
        (("architecture=llama", "architecture.rotary_base=1"), "architecture.rotary_base=1: must be .* greater than 1"),
        (("architecture.rotary_base=500000",), "architecture.rotary_base=500000: only architecture=llama"),
    ],
    ids=str,
)
def test_what_a_run_refuses(overrides: tuple[str, ...], said: str) -> None:
    """With the key as it is written, and nothing else."""
    with pytest.raises(ConfigError) as refused:
        check(overrides)
    assert len(refused.value.violations) == 1
    assert re.match(said, refused.value.violations[0])


def test_a_run_of_a_llama_has_what_it_asks_for() -> None:
    config = check(["architecture=llama", "model.n_kv_heads=2", "implementation=baseline"]).jobs[0].config
    network = config.network_config(300)
    assert (network.kv_heads, network.activation, network.compile) == (2, "swiglu", "auto")
    assert (network.epsilon, network.base) == (RMS_EPSILON, BASE)
    more = ("architecture.norm_epsilon=1e-5", "architecture.rotary_base=500000")
    network = check(["architecture=llama", *more]).jobs[0].config.network_config(300)
    assert (network.epsilon, network.base) == (1e-5, 500000)
    network = check(["architecture=vaswani"]).jobs[0].config.network_config(300)
    assert network.epsilon == EPSILON


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_kv_heads": 3}, r"n_kv_heads=3: must divide n_heads=4.*1 or 2 or 4"),
        ({"n_kv_heads": 0}, "n_kv_heads=0: must divide"),
        ({"n_kv_heads": 8}, "n_kv_heads=8: must divide"),
        ({"n_heads": 8}, r"needs an even width.*= 3; use d_model=32"),
        ({"activation": "gelu"}, "activation=gelu: architecture=llama supports swiglu"),
        ({"norm_epsilon": 0}, "norm_epsilon=0: must be a number of at least 1e-12 and less than 1"),
        ({"norm_epsilon": "1e-5"}, "norm_epsilon='1e-5': must be a number"),
        ({"rotary_base": math.inf}, "rotary_base=inf: must be a number greater than 1"),
        ({"architecture": "gpt2", "rotary_base": 1e4}, "rotary_base=10000.0: architecture=gpt2 has learned positions"),
        ({"architecture": "gpt2", "activation": "swiglu"}, "architecture=gpt2 supports gelu_tanh, gelu, relu"),
        ({"architecture": "gpt2", "n_kv_heads": 2}, "n_kv_heads=2: architecture=gpt2 has as many as n_heads=4"),
    ],
    ids=str,
)
def test_what_no_llama_can_be_built_from(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CustomTransformer(config_of(**changes))
