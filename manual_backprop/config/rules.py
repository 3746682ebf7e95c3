"""Rules for values of the configuration: one small class for each kind of value. Standard library only.

`read` takes a value as YAML or the command line gives it. It returns the value as the program uses it, or raises
ValueError with the rule in words ("must be ..."). `schema.py` says which key follows which rule.
"""

import math
import operator
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..common.plain_text import visible

LONGEST_TAG_NAME = 250  # MLflow's limit
# Names of keys and values here, and what other libraries and papers call them.
_NAMES_ELSEWHERE = {
    "activation": "act_fn activation_function hidden_act",
    "adamw": "adam adamw_torch adamw_torch_fused",
    "batch_size": (
        "batch bs eval_batch_size micro_batch_size per_device_eval_batch_size per_device_train_batch_size "
        "train_batch_size"
    ),
    "beams": "num-beams",
    "betas": "adam_beta1 adam_beta2 beta1 beta2",
    "bf16": "bf16-true bfloat16",
    "bf16_mixed": "bf16-mixed",
    "constant": "constant_with_warmup",
    "cosine": "cosine_with_min_lr",
    "cuda": "gpu",
    "d_ffn": "d_ff dim_feedforward ffn_dim intermediate_size",
    "d_model": "dim emb_dim embed_dim embedding_dim hidden_dim hidden_size n_embd",
    "dataset": "data",
    "dropout": (
        "attention_dropout attention_probs_dropout_prob attn_pdrop drop_rate dropout_rate embd_pdrop "
        "hidden_dropout_prob resid_pdrop"
    ),
    "epsilon": "adam_epsilon eps",
    "eval_batches": "eval_iters limit_val_batches",
    "eval_every": "eval_interval eval_steps eval_strategy evaluation_strategy val_check_interval",
    "experiments": "exp experiment",
    "fp16_mixed": "16 16-mixed float16 fp16 half",
    "fp32": "32 32-true float32",
    "fp64": "64 64-true double float64",
    "gelu_tanh": "gelu_new gelu_pytorch_tanh",
    "gradient_accumulation_steps": "accum_iter accumulate_grad_batches accumulation_steps grad_accum",
    "keep_checkpoints": "save_top_k save_total_limit",
    "label_smoothing": "label_smoothing_factor smoothing",
    "learning_rate": "base_lr lr max_lr peak_lr",
    "log_every": "log_every_n_steps log_interval logging_steps logging_strategy",
    "max-length": "max-new-tokens",
    "max_grad_norm": "clip clip_grad_norm grad_clip grad_norm gradient_clip_val",
    "max_seq_len": (
        "block_size context_length ctx_len max_padding max_position_embeddings n_ctx n_positions seq_len "
        "seq_length sequence_length"
    ),
    "max_steps": (
        "iterations iters limit_train_batches lr_decay_iters max_iterations max_iters num_steps steps total_steps "
        "train_steps"
    ),
    "min_learning_rate": "eta_min lr_min min_lr",
    "n_blocks": "depth layers n n_layer n_layers num_decoder_layers num_hidden_layers num_layers",
    "n_encoder_blocks": "num_encoder_layers",
    "n_heads": "h heads n_head nhead num_attention_heads num_heads",
    "n_kv_heads": "num_key_value_heads",
    "noam": "inverse_sqrt",
    "norm_epsilon": "layer_norm_eps layer_norm_epsilon rms_norm_eps",
    "num-samples": "num-return-sequences",
    "num_epochs": "epoch epochs max_epochs n_epochs num_train_epochs",
    "plateau": "reduce_lr_on_plateau",
    "prompt": "start",
    "recompute": "activation_checkpointing gradient_checkpointing",
    "rotary_base": "rope_theta",
    "save_every": "every_n_train_steps save_interval save_steps save_strategy",
    "seed": "data_seed manual_seed random_seed",
    "streaming": "stream",
    "subset_size": "max_train_samples",
    "threads": "num_threads",
    "tokenizer": "tok",
    "validation": "val_split validation_split_percentage",
    "warmup_ratio": "warmup",
    "warmup_steps": "num_warmup_steps warmup_iters",
    "weight_decay": "wd weight_decay_rate",
}
# The same for groups, and for full keys where several have the same last name.
_PLACES_ELSEWHERE = {
    "architecture": "arch bias model_type norm_first qkv_bias tie_word_embeddings",
    "dataset": "corpus dataset_name",
    "dataset.config": "dataset_config_name",
    "dataset.path": "data_dir data_path datasource train_file",
    "dataset.source_column": "lang_src source_lang",
    "dataset.target_column": "lang_tgt target_lang",
    "device": "accelerator gpus",
    "device.processes": "devices nproc_per_node num_processes",
    "experiment_name": "project wandb_project",
    "experiments": "config config_file config_name",
    "implementation": "backend",
    "implementation.compile": "torch_compile",
    "init_from": "model_name_or_path pretrained",
    "kernels.compile": "compile",
    "model": "model_name model_size",
    "optimizer": "optim",
    "precision": "amp bf16 dtype fp16 mixed_precision tf32 torch_dtype",
    "resume": "checkpoint ckpt ckpt_path preload resume_from resume_from_checkpoint",
    "run_name": "default_root_dir model_basename model_folder name out_dir output_dir wandb_run_name",
    "schedule": "decay_lr lr_decay lr_scheduler lr_scheduler_type scheduler",
    "tokenizer.path": "tokenizer_file",
    "tokenizer.vocab_size": "src_vocab_size tgt_vocab_size vocab",
    "tracking": "logger report_to wandb wandb_log",
    "training.patience": "early_stopping_patience",
}


def by_their_name(names: Mapping[str, str]) -> dict[str, str]:
    """From names here, each with names elsewhere, to names elsewhere with the one here."""
    return {theirs: ours for ours, listed in names.items() for theirs in listed.split()}


SYNONYMS, GROUP_SYNONYMS = by_their_name(_NAMES_ELSEWHERE), by_their_name(_PLACES_ELSEWHERE)

LARGEST = 1e30  # no setting needs more, and numbers above 3.4e38 overflow in fp32


def nearest(name: str, choices: list[str], likeness: float = 0.7) -> str | None:
    """The choice that was most likely meant by a misspelt name, or None. `likeness`: the smallest share of letters that
    both have, in the same order."""
    if (synonym := SYNONYMS.get(name.lower())) in choices:
        return synonym
    begun = [choice for choice in choices if len(name) >= 3 and choice.lower().startswith(name.lower())]
    if len(begun) == 1:
        return begun[0]
    found = get_close_matches(name.lower(), [choice.lower() for choice in choices], n=1, cutoff=likeness)
    return next((choice for choice in choices if choice.lower() == found[0]), None) if found else None


def did_you_mean(meant: str | None, otherwise: str = "") -> str:
    """The end of a sentence about something that there is not, with the nearest that there is."""
    return f"; did you mean {meant}?" if meant else otherwise


def shown(value: Any) -> str:
    """A value as one would type it on the command line; control characters are shown as escapes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        text = "[" + ",".join(map(shown, value)) + "]"
    elif isinstance(value, Mapping):
        text = "{" + ",".join(f"{shown(key)}:{shown(item)}" for key, item in value.items()) + "}"
    else:
        text = str(value)
    text = visible(text)
    return text if len(text) <= 100 else text[:97] + "..."


def whole(value: Any) -> int | None:
    """The value as an int if it is a whole number, such as 1e3 or 20.0; otherwise None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


@dataclass(frozen=True)
class Whole:
    """A whole number between two bounds; `1e3` is one."""

    minimum: int = 1
    maximum: int = 10**9
    optional: bool = False  # null is allowed as well
    word: str | None = None  # a word that is allowed as well

    def read(self, value: Any) -> int | str | None:
        if (value is None and self.optional) or (value is not None and value == self.word):
            return value
        number = whole(value)
        if number is None or not self.minimum <= number <= self.maximum:
            too_large = number is not None and number > self.maximum
            bounds = f"at most {self.maximum}" if too_large else f"at least {self.minimum}"
            words = (f", or the word {self.word}" if self.word else "") + (", or null" if self.optional else "")
            raise ValueError(f"must be a whole number of {bounds}{words}")
        return number


@dataclass(frozen=True)
class Number:
    """A finite number within bounds."""

    minimum: float | None = None  # value >= minimum
    above: float | None = None  # value > above
    below: float | None = None  # value < below
    optional: bool = False

    def read(self, value: Any) -> float | None:
        if value is None and self.optional:
            return None
        bounds = [
            (words, holds, bound)
            for words, holds, bound in (
                ("of at least", operator.ge, self.minimum),
                ("greater than", operator.gt, self.above),
                ("less than", operator.lt, self.below),
            )
            if bound is not None
        ]
        good = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < math.inf
        if not good or not all(holds(value, bound) for _, holds, bound in bounds):
            rule = " and ".join(f"{words} {bound}" for words, _, bound in bounds)
            raise ValueError(f"must be a number {rule}" + ", or null" * self.optional)
        if abs(value) > LARGEST:
            raise ValueError(f"must be a number of at most {LARGEST:g}")
        return float(value)


@dataclass(frozen=True)
class Word:
    """One of a few words."""

    choices: Sequence[str]
    optional: bool = False

    def read(self, value: Any) -> str | None:
        if value is None and self.optional:
            return None
        if value not in self.choices:
            hint = did_you_mean(nearest(str(value), list(self.choices)))
            raise ValueError(f"must be one of {', '.join(self.choices)}{hint}")
        return str(value)


@dataclass(frozen=True)
class Text:
    """Some text. A whole number becomes its digits, since YAML reads `run_name=7` as a number."""

    optional: bool = False
    maximum: int = 4096  # [characters]
    forbidden: str = ""  # characters

    def read(self, value: Any) -> str | None:
        if value is None and self.optional:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None:
            raise ValueError("must be given")
        if not isinstance(value, str):
            raise ValueError("must be text")
        if not value.strip():
            raise ValueError("must not be empty" + ("; use null for none" * self.optional))
        if not value.isprintable() or any(character in value for character in self.forbidden):
            raise ValueError(
                "must be printable characters" + (f" without {' '.join(self.forbidden)}" * bool(self.forbidden))
            )
        if len(value) > self.maximum:
            raise ValueError(f"must have at most {self.maximum} characters")
        return value


@dataclass(frozen=True)
class Flag:
    """true or false."""

    optional: bool = False

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value


@dataclass(frozen=True)
class FlagOrAuto:
    """true, false, or auto: the program decides."""

    optional: bool = False

    def read(self, value: Any) -> bool | str:
        if not isinstance(value, bool) and value != "auto":
            raise ValueError("must be auto, true or false")
        return value if isinstance(value, bool) else "auto"


@dataclass(frozen=True)
class Share:
    """A share between 0 and 1 of a split, the name of another split, or null."""

    optional: bool = True

    def read(self, value: Any) -> float | str | None:
        if value is None or (isinstance(value, str) and value.strip() and value.isprintable()):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError("must be a share between 0 and 1, the name of a split, or null")
        return float(value)


@dataclass(frozen=True)
class Betas:
    """The two decay rates of Adam's moments."""

    optional: bool = False

    def read(self, value: Any) -> tuple[float, float]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError("must be two numbers, as in [0.9,0.99]")
        try:
            first, second = (Number(minimum=0, below=1).read(item) for item in value)
        except ValueError as error:
            raise ValueError(f"each {error}") from None
        assert first is not None
        assert second is not None
        return first, second


@dataclass(frozen=True)
class Texts:
    """A list of texts."""

    optional: bool = False

    def read(self, value: Any) -> tuple[str, ...] | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
            raise ValueError("must be a list of nonempty texts, as in ['Return ','The ']" + ", or null" * self.optional)
        return tuple(value)


@dataclass(frozen=True)
class Words:
    """One or more of the choices, each at most once; null for none of them."""

    choices: tuple[str, ...]
    optional: bool = True

    def read(self, value: Any) -> tuple[str, ...] | None:
        if value is None:
            return None
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not words:
            raise ValueError(f"must be some of {', '.join(self.choices)}, as in {','.join(self.choices[:2])}, or null")
        for word in words:
            if word not in self.choices:
                hint = did_you_mean(nearest(str(word), list(self.choices)))
                raise ValueError(f"{shown(word)} is none of {', '.join(self.choices)}{hint}")
        if len({*words}) < len(words):
            raise ValueError("must not name one of them twice")
        return tuple(words)


@dataclass(frozen=True)
class Tags:
    """Names and their values, which become text. MLflow stores them and allows only some characters in a name."""

    optional: bool = False

    def read(self, value: Any) -> dict[str, str]:
        if not isinstance(value, Mapping):
            raise ValueError("must be names with values, as in tags.note=first or tags={note:first}")
        tags = {}
        for name, text in value.items():
            if not isinstance(name, str) or not name or not all(c.isalnum() or c in "_-./ " for c in name):
                raise ValueError(f"tag names have letters, digits and _ - . / only; {shown(name)} has others")
            if posixpath.normpath(name) != name or name.startswith(("..", "/")) or name == ".":  # MLflow's own rule
                raise ValueError(
                    f"a tag name must not begin or end with /, begin with .., contain //, or have . or .. as a part; "
                    f"MLflow rejects {shown(name)}"
                )
            if len(name) > LONGEST_TAG_NAME:
                raise ValueError(
                    f"tag names have {LONGEST_TAG_NAME} characters at most; {name[:20]}... has {len(name)}"
                )
            if isinstance(text, list | tuple | Mapping) or text is None or text == "":
                raise ValueError(f"the tag {name} must have a text or a number as its value")
            tags[name] = text if isinstance(text, str) else shown(text)
            if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in tags[name]):
                raise ValueError(f"the value of the tag {name} has a character that is not valid in text")
        return tags


Rule = Whole | Number | Word | Words | Text | Flag | FlagOrAuto | Share | Betas | Texts | Tags
