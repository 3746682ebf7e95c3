"""Models go to `transformers` and come from there: the same logits, the same loss, the same gradients."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manual_backprop import CustomTransformerConfig, CustomTransformerWrapper
from manual_backprop.checkpoints.checkpoint import load_checkpoint
from manual_backprop.common.batch import Batch
from manual_backprop.common.durable_files import new_folder
from manual_backprop.common.errors import InputError
from manual_backprop.convert import main
from manual_backprop.data.tokens.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.huggingface import layouts
from manual_backprop.models.huggingface.weights import to_theirs, use_exact_norms
from manual_backprop.models.implementations import IMPLEMENTATIONS, build_network
from manual_backprop.models.network import Network
from manual_backprop.study.gradient_check.low_precision import median_ratios
from manual_backprop.study.gradient_check.measure import error_of, floor_of
from manual_backprop.study.gradient_check.network_check import set_proof_scale
from manual_backprop.trained_models.saved_model import load
from manual_backprop.trained_models.tokenizer_files import write_tokenizer

LOGITS_BAR = {"fp64": 1e-10, "fp32": 1e-5}
GRADIENT_BAR = 1e-10  # float64
# Vocabularies that are no multiples of 8; blocks, heads and widths that are not alike; usual epsilons and others:
# first the GPT-2s, then the Llamas.
SHAPES: list[dict[str, Any]] = [
    {"vocab_size": 37, "d_model": 24, "n_blocks": 3, "n_heads": 4, "d_ffn": 52, "max_seq_len": 16},
    {"vocab_size": 61, "d_model": 10, "n_blocks": 1, "n_heads": 5, "d_ffn": 7, "max_seq_len": 9, "activation": "relu"}
    | {"norm_epsilon": 1e-6},
    {"vocab_size": 5, "d_model": 6, "n_blocks": 2, "n_heads": 1, "d_ffn": 24, "max_seq_len": 3, "activation": "gelu"},
    {"vocab_size": 37, "d_model": 24, "n_blocks": 3, "n_heads": 4, "n_kv_heads": 2, "d_ffn": 52, "max_seq_len": 16},
    {"vocab_size": 61, "d_model": 30, "n_blocks": 1, "n_heads": 5, "n_kv_heads": 1, "d_ffn": 7, "max_seq_len": 9}
    | {"norm_epsilon": 1e-5, "rotary_base": 500000.0},
    {"vocab_size": 5, "d_model": 6, "n_blocks": 2, "n_heads": 3, "d_ffn": 23, "max_seq_len": 3},
]
for number, shape in enumerate(SHAPES):
    shape["architecture"] = ("gpt2", "llama")[number // 3]
TINY = SHAPES[0]

pytestmark = pytest.mark.usefixtures("here")


def config_of(shape: dict[str, Any], precision: str = "fp32", **more: Any) -> CustomTransformerConfig:
    return CustomTransformerConfig(**(shape | {"precision": precision} | more))


def save_ours(config: CustomTransformerConfig, folder: Path) -> CustomTransformer:
    model = CustomTransformerWrapper(config)
    set_proof_scale(model.network)
    model.save_checkpoint(folder)
    return model.network


def theirs_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return use_exact_norms(model) if model.dtype == torch.float64 else model


def save_theirs(config: CustomTransformerConfig, folder: Path, **options: Any) -> Any:
    """A model built by transformers, with weights large enough that each one matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    content = layouts.config_json(config, None) | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(content.pop("model_type"), **content))
    model = model.to(config.get_dtype()).eval()
    filled = CustomTransformer(config)
    set_proof_scale(filled)
    missed = model.load_state_dict(to_theirs(filled.parameters, config), strict=False)
    assert not missed.unexpected_keys
    assert missed.missing_keys in ([], ["lm_head.weight"])  # the tied one
    model.save_pretrained(folder, **options)
    return model


def batch_of(config: CustomTransformerConfig, T: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and lengths of three rows; the last two end in padding, which does not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (3, T), generator=generator)
    targets = torch.randint(config.vocab_size, (3, T), generator=generator)
    real = torch.arange(T) < torch.tensor([[T], [max(1, T - 1)], [max(1, T // 2)]])
    return tokens, targets.masked_fill(~real, -100), real.long()


def step_of_theirs(model: Any, tokens: Tensor, targets: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss is computed here from the logits, since that of transformers is float32."""
    model.zero_grad()
    logits = model(tokens, attention_mask=real).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (targets >= 0).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def step_of_ours(network: Network, tokens: Tensor, targets: Tensor, real: Tensor) -> tuple[Tensor, Any]:
    """Gradients under their names. Padding is a segment of its own."""
    network.zero_gradients()
    count = int((targets >= 0).sum())
    loss = network.loss_and_gradients(Batch(tokens, targets, real), denominator=count, step=None)
    return loss, to_theirs(network.gradients, network.config)


# To transformers


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exported_logits_are_ours(shape: dict[str, Any], precision: str, tmp_path: Path) -> None:
    config = config_of(shape, precision)
    network = save_ours(config, tmp_path / "mine")
    main(["to-hf", "mine", "exported"])
    theirs = theirs_of(tmp_path / "exported")
    assert theirs.dtype == config.get_dtype()
    for T in (config.max_seq_len, max(1, config.max_seq_len - 4)):
        tokens, _, _ = batch_of(config, T)
        with torch.no_grad():
            assert error_of(network.predict(tokens), theirs(tokens).logits) <= LOGITS_BAR[precision]
    again = load("exported", device="cpu")  # an exported folder is a RUN
    same = ("traits", "epsilon", "base")
    assert [getattr(again.model.config, name) for name in same] == [getattr(config, name) for name in same]
    assert all(torch.equal(again.model.network.parameters[name], p) for name, p in network.parameters.items())


def test_without_exact_norms_a_llama_in_float64_has_seven_digits(tmp_path: Path) -> None:
    """The model card says so. If this test fails, transformers has changed, and the card can be simplified."""
    from transformers import AutoModelForCausalLM

    config = config_of(SHAPES[3], "fp64")
    network = save_ours(config, tmp_path / "mine")
    main(["to-hf", "mine", "exported"])
    tokens, _, _ = batch_of(config, 9)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")(tokens).logits
    assert 1e-10 < error_of(network.predict(tokens), logits) < 1e-5


# From transformers


@pytest.mark.parametrize("shape", SHAPES)
def test_imported_loss_and_gradients_are_theirs_in_float64(shape: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(shape, "fp64")
    save_theirs(config, tmp_path / "theirs")
    main(["from-hf", "theirs", "mine"])
    imported, theirs = load("mine", device="cpu").model.network, theirs_of(tmp_path / "theirs")
    for implementation in IMPLEMENTATIONS:
        ours = build_network(implementation, imported.config)
        ours.load_parameters(imported.parameters)
        for T in (config.max_seq_len, max(2, config.max_seq_len - 4)):
            batch = batch_of(config, T, seed=T)
            (want_loss, want), (loss, got) = step_of_theirs(theirs, *batch), step_of_ours(ours, *batch)
            assert error_of(loss, want_loss) <= GRADIENT_BAR
            assert set(got) == set(want)
            floor = floor_of(want)
            errors = {name: error_of(got[name], want[name], floor) for name in want}
            assert max(errors.values()) <= GRADIENT_BAR, (implementation, errors)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},  # before version 5
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500000},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {},
    ],
    ids=str,
)
def test_the_base_is_found_where_transformers_finds_it(changes: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    content = layouts.config_json(config_of(SHAPES[3]), None)
    content = {name: value for name, value in content.items() if not name.startswith("rope_")} | changes
    assert layouts.network_of(content, "config.json").base == LlamaConfig(**content).rope_parameters["rope_theta"]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]])
def test_imported_gradients_in_float32_err_no_more_than_twice_as_much(shape: dict[str, Any], tmp_path: Path) -> None:
    """Against float64: medians over draws, since a single draw of rounding errors is random."""
    config = config_of(shape, "fp32")
    theirs = save_theirs(config, tmp_path / "theirs")
    main(["from-hf", "theirs", "mine"])
    ours = load("mine", device="cpu").model.network
    exact = CustomTransformer(replace(ours.config, precision="fp64"))
    exact.load_parameters(ours.parameters)

    def draw(seed: int) -> dict[str, tuple[float, float]]:
        batch = batch_of(config, 13, seed)
        (_, want), (_, got) = step_of_ours(exact, *batch), step_of_ours(ours, *batch)
        _, autograd = step_of_theirs(theirs, *batch)
        floor = floor_of(want)
        return {
            name: (error_of(got[name], want[name], floor), error_of(autograd[name], want[name], floor)) for name in want
        }

    ratios = median_ratios(map(draw, range(8)), lambda name: 1e-30)
    assert max(ratios.values()) <= 2, ratios


def test_weights_in_several_files_without_prefix_and_with_masks(tmp_path: Path) -> None:
    """Like the first checkpoints of GPT-2 on the hub: a model without head, with masks among the weights."""
    from safetensors.torch import load_file, save_file

    config = config_of(TINY)
    save_theirs(config, tmp_path / "theirs")
    main(["from-hf", "theirs", "whole"])
    save_theirs(config, tmp_path / "sharded", max_shard_size="10KB")
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    main(["from-hf", "sharded", "from sharded"])
    file = tmp_path / "theirs" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}, file)
    main(["from-hf", "theirs", "bare"])
    save_file({f"_orig_mod.module.{name}": tensor for name, tensor in bare.items()}, file)
    main(["from-hf", "theirs", "wrapped"])
    want = load("whole").model.network.parameters
    for name in ("from sharded", "bare", "wrapped"):
        assert all(torch.equal(tensor, want[key]) for key, tensor in load(name).model.network.parameters.items())


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp32")])
def test_half_precision(dtype: torch.dtype, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_theirs(config_of(TINY), tmp_path / "theirs").to(dtype).save_pretrained(tmp_path / "half")
    main(["from-hf", "half", "mine"])
    assert f"gpt2, {precision}," in capsys.readouterr().out
    assert load("mine").model.config.precision == precision


UNSUPPORTED: list[tuple[int, dict[str, Any], str]] = [
    (0, {"layer_norm_epsilon": 0}, "layer_norm_epsilon=0: must be a number of at least 1e-12 and less than 1"),
    (0, {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon='1e-5': must be a number"),
    (0, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    (0, {"add_cross_attention": True}, "add_cross_attention=True"),
    (0, {"activation_function": "quick_gelu"}, "activation_function='quick_gelu': there are gelu_new, gelu, relu"),
    (0, {"activation_function": ["gelu_new"]}, "activation_function=['gelu_new']: there are gelu_new, gelu, relu"),
    (0, {"model_type": ["gpt2"]}, "model_type=['gpt2']; what can be read here is gpt2 and llama"),
    (0, {"model_type": "bert"}, "model_type='bert'; what can be read here is gpt2 and llama"),
    (0, {"n_embd": "24"}, "n_embd='24': expected a whole number"),
    (0, {"n_head": 5}, "d_model=24: must be divisible by n_heads=5"),
    (0, {"n_inner": 40}, "h.0.mlp.c_fc.weight has shape (24, 52), expected (24, 40)"),
    (0, {"n_layer": 4}, "transformer.h.3.ln_1.weight is missing"),
    (0, {"n_layer": 2}, "transformer.h.2.ln_1.weight is unknown here"),
    (3, {"rms_norm_eps": math.nan}, "rms_norm_eps=nan: must be a number"),
    (3, {"attention_bias": True}, "attention_bias=True"),
    (3, {"mlp_bias": True}, "mlp_bias=True"),
    (3, {"hidden_act": "gelu"}, "hidden_act='gelu': here it is always 'silu'"),
    (3, {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    (3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    (3, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters of type 'llama3'"),
    (
        3,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}},
        "rope_theta=0.5: must be a number greater than 1",
    ),
    (3, {"head_dim": 8}, "head_dim=8: must be hidden_size / num_attention_heads = 6"),
    (3, {"quantization_config": {"bits": 4}}, "quantization_config"),
]


@pytest.mark.parametrize(("shape", "changes", "words"), UNSUPPORTED)
def test_what_would_calculate_something_else_is_refused_by_name(
    shape: int, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_ours(config_of(SHAPES[shape]), tmp_path / "mine")
    main(["to-hf", "mine", "exported"])
    file = tmp_path / "exported" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError) as refusal:
        main(["from-hf", "exported", "again"])
    assert words in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "mine"]


def test_every_unsupported_option_is_named_at_once(tmp_path: Path) -> None:
    content = layouts.config_json(config_of(SHAPES[3]), None) | {"attention_bias": True, "rms_norm_eps": -1}
    with pytest.raises(InputError, match=r"(?s)attention_bias=True.*rms_norm_eps=-1"):
        layouts.network_of(content, "config.json")


def published(*values: Any, **more: Any) -> dict[str, Any]:
    """A config.json from the hub: sizes in the order of its keys, and other keys."""
    keys = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
    sizes = dict(zip((*keys, "num_key_value_heads", "rms_norm_eps", "vocab_size"), values, strict=True))
    usual = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
    return usual | {"pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False} | sizes | more


PUBLISHED = {
    "Llama 2 7B": published(4096, 11008, 4096, 32, 32, 32, 1e-5, 32000),
    "TinyLlama 1.1B": published(2048, 5632, 2048, 32, 22, 4, 1e-5, 32000, torch_dtype="float32"),
    "Llama 3 8B": published(4096, 14336, 8192, 32, 32, 8, 1e-5, 128256, attention_bias=False, rope_theta=500000.0),
    "Code Llama 7B": published(4096, 11008, 16384, 32, 32, 32, 1e-5, 32016, rope_theta=1000000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_llamas_are_read(name: str) -> None:
    content = PUBLISHED[name]
    network = layouts.network_of(content, "config.json")
    assert (network.epsilon, network.base) == (1e-5, content.get("rope_theta", 10000))
    assert (network.d_model, network.kv_heads) == (content["hidden_size"], content["num_key_value_heads"])


def test_a_published_llama_with_scaled_positions_and_a_tied_head_is_refused_for_both() -> None:
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    content = published(2048, 8192, 131072, 32, 16, 8, 1e-5, 128256, head_dim=64, rope_theta=500000.0)
    content |= {"rope_scaling": scaling, "tie_word_embeddings": True}  # Llama 3.2 1B
    with pytest.raises(InputError) as refusal:
        layouts.network_of(content, "config.json")
    assert str(refusal.value).splitlines()[1:] == [
        "  tie_word_embeddings=True: here it is always False",
        "  rope_scaling of type 'llama3': positions are turned without scaling here",
    ]


def test_what_a_file_leaves_out_is_what_transformers_takes() -> None:
    from transformers import GPT2Config, LlamaConfig

    for shape, theirs in ((SHAPES[0], GPT2Config()), (SHAPES[3], LlamaConfig())):
        content = layouts.config_json(config_of(shape), None)
        key = layouts.LAYOUTS[theirs.model_type].epsilon
        del content[key]
        assert layouts.network_of(content, "config.json").epsilon == getattr(theirs, key)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    save_ours(config_of(TINY), tmp_path / "mine")
    main(["to-hf", "mine", "exported"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((tmp_path / "exported" / "config.json").read_text())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"whatever")
    (tmp_path / "indexed").mkdir()
    (tmp_path / "indexed" / "config.json").write_text((tmp_path / "exported" / "config.json").read_text())
    outside = {"weight_map": {"transformer.wte.weight": "../exported/model.safetensors"}}
    (tmp_path / "indexed" / "model.safetensors.index.json").write_text(json.dumps(outside))
    refusals = {
        "empty": "holds no config.json",
        "pickled": "only as a pickle .pytorch_model.bin.*save_pretrained",
        "indexed": "names ../exported/model.safetensors, which is not in the folder",
        "exported/config.json": "is a file: give the folder",
        "./wings": "there is no folder './wings'",
        "a/b/c": "there is no folder 'a/b/c'",
        "~nobody-of-that-name": "there is no folder '~nobody-of-that-name'",
    }
    for source, words in refusals.items():
        with pytest.raises(InputError, match=words):
            main(["from-hf", source, "new"])
    with pytest.raises(InputError, match="exported holds files already: name a new folder"):
        main(["to-hf", "mine", "exported"])
    (tmp_path / "exported" / "model.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        main(["from-hf", "exported", "new"])
    (tmp_path / f".empty.staging-{2**22}-abcdef").mkdir()  # of a process that was killed
    main(["to-hf", "mine", "empty"])  # an empty folder is as good as none
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or path.name == "new"]


def test_a_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "half").write_text("a part")
            assert not (tmp_path / "new").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_vaswani_has_no_layout(tmp_path: Path) -> None:
    save_ours(config_of({**TINY, "architecture": "vaswani"}), tmp_path / "mine")
    with pytest.raises(InputError, match="architecture=vaswani cannot be exported: no causal language model of"):
        main(["to-hf", "mine", "exported"])


def test_a_name_of_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from command_tools import command

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    done = command("from-hf", "openai-community/gpt2", "new", cwd=tmp_path, module="manual_backprop.convert")
    assert done.returncode == 2
    assert "was not downloaded before, and the hub cannot be reached. Go online once" in done.stderr
    assert "hf download openai-community/gpt2 --local-dir FOLDER" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


# Tokenizers

TEXTS = ["the cat  saw \n7 mice.", "".join(map(chr, range(1, 0x250))), "ä€😀 x' n't  ", "a\tb\r\n\n c"]


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), CharTokenizer.train(TEXTS), BpeTokenizer.train(TEXTS * 5, 300)],
    ids=lambda one: one.name,
)
def test_the_tokenizer_has_the_same_ids_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tokenizer, tmp_path, 64)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert theirs.eos_token_id == tokenizer.end_token_id == again.end_token_id
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids == again.encode(text)
        assert theirs.decode(ids) == text == again.decode(ids)
    if tokenizer.name == "char":
        with pytest.raises(InputError, match="cannot encode every character"):
            again.encode("\u4e00")


def test_a_tokenizer_that_is_too_large_for_the_network(tmp_path: Path) -> None:
    save_theirs(config_of(TINY), tmp_path / "theirs")
    write_tokenizer(ByteTokenizer(), tmp_path / "theirs", 16)
    with pytest.raises(InputError, match="its tokenizer has 257 tokens, its network 37"):
        main(["from-hf", "theirs", "mine"])


# A run's model


def test_a_run_is_exported_with_its_card_and_comes_back(copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    main(["to-hf", "last@8", "exported"])
    run, exported = load("last@8"), load("exported")
    assert exported.line == run.line.replace(f"outputs/runs/{copy.name}/checkpoints/step-000008", "exported")
    assert exported.config() == run.config()
    card = (tmp_path / "exported" / "README.md").read_text()
    state = load_checkpoint(copy / "checkpoints" / "step-000008").state
    for words in (
        "AutoModelForCausalLM.from_pretrained",
        f"| validation/loss | {run.metric:.6g} |",
        f"| validation/perplexity | {math.exp(run.metric or 0):.6g} |",
        f"| digest of the tokens | {state['dataset_digest']} |",
        "gradient check: passed (",
        '"d_model": 16',
    ):
        assert words in card
    assert str(tmp_path) not in card
    main(["from-hf", "exported", "back"])
    back = load("back")
    assert back.tokenizer().encode("the cat") == run.tokenizer().encode("the cat")
    tokens = torch.tensor([run.tokenizer().encode("the cat")])
    # other kernels, so other roundings
    torch.testing.assert_close(back.model.network.predict(tokens), run.model.network.predict(tokens))
    # other weights: what the run said of them is not theirs
    file = tmp_path / "exported" / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    changed = load("exported")
    assert changed.metric is None
    assert math.isclose(
        float(changed.model.network.parameters["final_norm.weight"][0]),
        2 * float(run.model.network.parameters["final_norm.weight"][0]),
    )


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "rope_scaling" in capsys.readouterr().out
    for arguments, words in (
        (["to_hf", "last", "new"], "to_hf: must be to-hf or from-hf; did you mean to-hf?"),
        (["to-hf", "last"], "required: FOLDER"),
        (["to-hf", "wings", "new"], "there is no run 'wings'"),
    ):
        with pytest.raises(InputError, match=words.replace("?", r"\?")):
            main(arguments)
    assert not list(tmp_path.iterdir())
