"""The layouts of GPT-2 and Llama in `transformers`: config.json, and the names and shapes of weights.

Standard library only. A setting that would compute something else here than in `transformers` is refused by its name in
config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manual_backprop.common.errors import InputError
from manual_backprop.config.rules import Number
from manual_backprop.config.schema import NORM_EPSILON_RULE, ROTARY_BASE_RULE, CustomTransformerConfig

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}  # ours: theirs
# The same functions by other names.
SYNONYMS = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
DTYPES = {"fp64": "float64", "bf16": "bfloat16"}  # of parameters; float32 in the other precisions


@dataclass(frozen=True)
class Entry:
    """A weight of theirs and ours: ours stacked by rows, and transposed where theirs is (inputs, outputs)."""

    theirs: str
    ours: tuple[str, ...]
    turned: bool = False


@dataclass(frozen=True)
class Layout:
    """A network of transformers. `sizes`: our keys -> theirs; `demanded`: values that our network has built in. The
    modules with weights, in their order: their name -> ours, several of which are stacked by rows."""

    model_type: str  # the name of our architecture as well
    class_name: str
    prefix: str  # of all weights except the head's; the file of a model without head has none
    sizes: Mapping[str, str]
    epsilon: str  # their key of the norms' epsilon; if it is missing, both use the usual one
    demanded: Mapping[str, Any]
    first: Mapping[str, str]
    blocks: str
    of_block: Mapping[str, str]
    last: Mapping[str, str]


GPT2 = Layout(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    prefix="transformer.",
    sizes={
        "vocab_size": "vocab_size",
        "d_model": "n_embd",
        "n_blocks": "n_layer",
        "n_heads": "n_head",
        "max_seq_len": "n_positions",
    },
    epsilon="layer_norm_epsilon",
    demanded={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    first={"transformer.wte": "token_embedding", "transformer.wpe": "position_embedding"},
    blocks="transformer.h",
    of_block={
        "ln_1": "attention_norm",
        "attn.c_attn": "attention.query attention.key attention.value",
        "attn.c_proj": "attention.output",
        "ln_2": "feed_forward_norm",
        "mlp.c_fc": "feed_forward.hidden",
        "mlp.c_proj": "feed_forward.output",
    },
    last={"transformer.ln_f": "final_norm"},
)
LLAMA = Layout(
    model_type="llama",
    class_name="LlamaForCausalLM",
    prefix="model.",
    sizes={
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "n_blocks": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_ffn": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
    },
    epsilon="rms_norm_eps",
    demanded={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
    first={"model.embed_tokens": "token_embedding"},
    blocks="model.layers",
    of_block={
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "post_attention_layernorm": "feed_forward_norm",
        "mlp.gate_proj": "feed_forward.gate",
        "mlp.up_proj": "feed_forward.hidden",
        "mlp.down_proj": "feed_forward.output",
    },
    last={"model.norm": "final_norm", "lm_head": "head"},
)
LAYOUTS = {layout.model_type: layout for layout in (GPT2, LLAMA)}


def layout_of(config: CustomTransformerConfig) -> Layout:
    """The layout of a network of ours. Raises InputError for a network that `transformers` does not have."""
    if config.network != "decoder":
        raise InputError(
            f"network={config.network} cannot be exported: transformers has no encoder or encoder-decoder of these "
            "blocks, so nothing there could load it. network=decoder can, with architecture=gpt2 or llama."
        )
    if config.positions not in (None, config.traits.positions):
        raise InputError(
            f"model.positions={config.positions} cannot be exported: architecture={config.architecture} has "
            f"{config.traits.positions} positions in transformers."
        )
    if config.architecture not in LAYOUTS:
        raise InputError(
            f"architecture={config.architecture} cannot be exported: no causal language model of transformers is "
            "post-norm with fixed sinusoidal positions, so nothing there could load it. architecture=gpt2 and "
            "architecture=llama can."
        )
    return LAYOUTS[config.architecture]


# config.json


def config_json(config: CustomTransformerConfig, end_token_id: int | None) -> dict[str, Any]:
    """The config.json of a network of ours. The end token of a document also begins the next: both are one token."""
    layout = layout_of(config)
    content = {
        "architectures": [layout.class_name],
        "model_type": layout.model_type,
        **{theirs: getattr(config, ours) for ours, theirs in layout.sizes.items()},
        **layout.demanded,
        layout.epsilon: config.epsilon,
        "bos_token_id": end_token_id,
        "eos_token_id": end_token_id,
        "pad_token_id": None,
        "dtype": DTYPES.get(config.precision, "float32"),
    }
    if layout is GPT2:
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        activation = ACTIVATIONS[config.activation or config.traits.activation]
        return content | {"n_inner": config.d_ffn, "activation_function": activation} | drops
    return content | {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_head,
        "attention_dropout": config.dropout,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.base},
        "rope_theta": config.base,  # transformers before version 5 reads it here
    }


def network_of(content: Mapping[str, Any], where: str, precision: str = "fp32") -> CustomTransformerConfig:
    """Our config of a config.json. Raises InputError with everything in it that has no counterpart here."""
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        raise InputError(f"{where} has model_type={model_type!r}; what can be read here is {' and '.join(LAYOUTS)}.")
    layout = LAYOUTS[model_type]
    sizes, problems = {}, _unsupported(content, layout)
    for ours, theirs in layout.sizes.items():
        value = content.get(theirs, content.get("n_ctx") if theirs == "n_positions" else None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{theirs}={value!r}: expected a whole number of at least 1")
        sizes[ours] = value
    more: dict[str, Any] = {
        "norm_epsilon": _number(layout.epsilon, content.get(layout.epsilon), NORM_EPSILON_RULE, problems)
    }
    if layout is LLAMA:
        base = _rope(content).get("rope_theta", content.get("rope_theta"))
        more["rotary_base"] = _number("rope_theta", base, ROTARY_BASE_RULE, problems)
    if problems:
        raise _refusal(where, problems)
    if layout is GPT2:
        more["d_ffn"] = content.get("n_inner") or 4 * sizes["d_model"]
        more["activation"] = next(ours for ours, theirs in ACTIVATIONS.items() if theirs == _activation(content))
    else:
        groups = content.get("num_key_value_heads")
        more["n_kv_heads"] = None if groups == sizes["n_heads"] else groups
    config = CustomTransformerConfig(**sizes, **more, architecture=layout.model_type, precision=precision)
    if problems := config.violations():
        raise _refusal(where, problems)
    if content.get("head_dim") not in (None, config.d_head):
        problem = f"head_dim={content['head_dim']}: must be hidden_size / num_attention_heads = {config.d_head}"
        raise _refusal(where, [problem])
    return config


def _refusal(where: str, problems: list[str]) -> InputError:
    return InputError("\n  ".join([f"{where} describes a network that cannot be built here:", *problems]))


def _number(key: str, value: Any, rule: Number, problems: list[str]) -> float | None:
    try:
        return rule.read(value)
    except ValueError as error:
        problems.append(f"{key}={value!r}: {error}")
        return None


def _rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of a config.json: `rope_parameters` since version 5 of transformers, `rope_scaling` before."""
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(inner := content.get(name), Mapping):
            found |= inner
    return found


def _unsupported(content: Mapping[str, Any], layout: Layout) -> list[str]:
    problems = []
    for key, demanded in layout.demanded.items():
        value = content.get(key, demanded)
        if (SYNONYMS.get(value, value) if isinstance(value, str) else value) != demanded:
            problems.append(f"{key}={value!r}: here it is always {demanded!r}")
    if layout is GPT2 and _activation(content) not in ACTIVATIONS.values():
        known = ", ".join((*ACTIVATIONS.values(), "gelu_pytorch_tanh"))
        problems.append(f"activation_function={content['activation_function']!r}: there are {known}")
    if layout is LLAMA:
        for name in ("rope_parameters", "rope_scaling"):
            inner = content.get(name) or {}
            kind = inner.get("rope_type", inner.get("type", "default")) if isinstance(inner, Mapping) else inner
            if kind != "default":
                problems.append(f"{name} of type {kind!r}: positions are turned without scaling here")
    if content.get("quantization_config") is not None:
        problems.append("quantization_config: weights must be plain numbers")
    return problems


def _activation(content: Mapping[str, Any]) -> Any:
    """GPT-2's activation."""
    name = content.get("activation_function", "gelu_new")
    return SYNONYMS.get(name, name) if isinstance(name, str) else name


# Weights


def entries(config: CustomTransformerConfig) -> list[Entry]:
    """Every weight of the layout with its weights of ours. A tied head is not a separate weight."""
    layout, found = layout_of(config), []
    modules = list(layout.first.items())
    for block in range(config.n_blocks):
        for theirs, ours in layout.of_block.items():
            names = [f"blocks.{block}.{name}" for name in ours.split()]
            modules.append((f"{layout.blocks}.{block}.{theirs}", " ".join(names)))
    for theirs, ours in [*modules, *layout.last.items()]:
        for kind in ("weight", "bias") if config.traits.biases and "embedding" not in ours else ("weight",):
            turned = kind == "weight" and "c_" in theirs  # Conv1D: (inputs, outputs)
            found.append(Entry(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours.split()), turned))
    return found
