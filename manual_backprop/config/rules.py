"""Rules for values of the configuration: one small class for each kind of value. Standard library only.

`read` takes a value as YAML or the command line gives it. It returns the value as the program uses it, or raises
ValueError with the rule in words ("must be ..."). `schema.py` says which key follows which rule.
"""

import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..common.plain_text import visible

LONGEST_TAG_NAME = 250  # MLflow's limit
# Names of keys and values in other libraries and papers -> names here.
SYNONYMS = {
    "16": "fp16_mixed",
    "16-mixed": "fp16_mixed",
    "32": "fp32",
    "32-true": "fp32",
    "64": "fp64",
    "64-true": "fp64",
    "accum_iter": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "act_fn": "activation",
    "activation_checkpointing": "recompute",
    "activation_function": "activation",
    "adam": "adamw",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "epsilon",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "attention_dropout": "dropout",
    "attention_probs_dropout_prob": "dropout",
    "attn_pdrop": "dropout",
    "base_lr": "learning_rate",
    "batch": "batch_size",
    "beta1": "betas",
    "beta2": "betas",
    "bf16-mixed": "bf16_mixed",
    "bf16-true": "bf16",
    "bfloat16": "bf16",
    "block_size": "max_seq_len",
    "bs": "batch_size",
    "clip": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "constant_with_warmup": "constant",
    "context_length": "max_seq_len",
    "cosine_with_min_lr": "cosine",
    "ctx_len": "max_seq_len",
    "d_ff": "d_ffn",
    "data": "dataset",
    "data_seed": "seed",
    "depth": "n_blocks",
    "dim": "d_model",
    "dim_feedforward": "d_ffn",
    "double": "fp64",
    "drop_rate": "dropout",
    "dropout_rate": "dropout",
    "emb_dim": "d_model",
    "embd_pdrop": "dropout",
    "embed_dim": "d_model",
    "embedding_dim": "d_model",
    "epoch": "num_epochs",
    "epochs": "num_epochs",
    "eps": "epsilon",
    "eta_min": "min_learning_rate",
    "eval_batch_size": "batch_size",
    "eval_interval": "eval_every",
    "eval_iters": "eval_batches",
    "eval_steps": "eval_every",
    "eval_strategy": "eval_every",
    "evaluation_strategy": "eval_every",
    "every_n_train_steps": "save_every",
    "exp": "experiments",
    "experiment": "experiments",
    "ffn_dim": "d_ffn",
    "float16": "fp16_mixed",
    "float32": "fp32",
    "float64": "fp64",
    "fp16": "fp16_mixed",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gpu": "cuda",
    "grad_accum": "gradient_accumulation_steps",
    "grad_clip": "max_grad_norm",
    "grad_norm": "max_grad_norm",
    "gradient_checkpointing": "recompute",
    "gradient_clip_val": "max_grad_norm",
    "h": "n_heads",
    "half": "fp16_mixed",
    "heads": "n_heads",
    "hidden_act": "activation",
    "hidden_dim": "d_model",
    "hidden_dropout_prob": "dropout",
    "hidden_size": "d_model",
    "intermediate_size": "d_ffn",
    "inverse_sqrt": "noam",
    "iterations": "max_steps",
    "iters": "max_steps",
    "label_smoothing_factor": "label_smoothing",
    "layer_norm_eps": "norm_epsilon",
    "layer_norm_epsilon": "norm_epsilon",
    "layers": "n_blocks",
    "limit_train_batches": "max_steps",
    "limit_val_batches": "eval_batches",
    "log_every_n_steps": "log_every",
    "log_interval": "log_every",
    "logging_steps": "log_every",
    "logging_strategy": "log_every",
    "lr": "learning_rate",
    "lr_decay_iters": "max_steps",
    "lr_min": "min_learning_rate",
    "manual_seed": "seed",
    "max-new-tokens": "max-length",
    "max_epochs": "num_epochs",
    "max_iterations": "max_steps",
    "max_iters": "max_steps",
    "max_lr": "learning_rate",
    "max_padding": "max_seq_len",
    "max_position_embeddings": "max_seq_len",
    "max_train_samples": "subset_size",
    "micro_batch_size": "batch_size",
    "min_lr": "min_learning_rate",
    "n": "n_blocks",
    "n_ctx": "max_seq_len",
    "n_embd": "d_model",
    "n_epochs": "num_epochs",
    "n_head": "n_heads",
    "n_layer": "n_blocks",
    "n_layers": "n_blocks",
    "n_positions": "max_seq_len",
    "nhead": "n_heads",
    "num-beams": "beams",
    "num-return-sequences": "num-samples",
    "num_attention_heads": "n_heads",
    "num_decoder_layers": "n_blocks",
    "num_encoder_layers": "n_encoder_blocks",
    "num_heads": "n_heads",
    "num_hidden_layers": "n_blocks",
    "num_key_value_heads": "n_kv_heads",
    "num_layers": "n_blocks",
    "num_steps": "max_steps",
    "num_threads": "threads",
    "num_train_epochs": "num_epochs",
    "num_warmup_steps": "warmup_steps",
    "peak_lr": "learning_rate",
    "per_device_eval_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "random_seed": "seed",
    "reduce_lr_on_plateau": "plateau",
    "resid_pdrop": "dropout",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "save_interval": "save_every",
    "save_steps": "save_every",
    "save_strategy": "save_every",
    "save_top_k": "keep_checkpoints",
    "save_total_limit": "keep_checkpoints",
    "seq_len": "max_seq_len",
    "seq_length": "max_seq_len",
    "sequence_length": "max_seq_len",
    "smoothing": "label_smoothing",
    "start": "prompt",
    "steps": "max_steps",
    "stream": "streaming",
    "tok": "tokenizer",
    "total_steps": "max_steps",
    "train_batch_size": "batch_size",
    "train_steps": "max_steps",
    "val_check_interval": "eval_every",
    "val_split": "validation",
    "validation_split_percentage": "validation",
    "warmup": "warmup_ratio",
    "warmup_iters": "warmup_steps",
    "wd": "weight_decay",
    "weight_decay_rate": "weight_decay",
}

# Names of other programs' options -> groups here, or a full key where several keys have the same last name.
GROUP_SYNONYMS = {
    "accelerator": "device",
    "amp": "precision",
    "arch": "architecture",
    "backend": "implementation",
    "bf16": "precision",
    "bias": "architecture",
    "checkpoint": "resume",
    "ckpt": "resume",
    "ckpt_path": "resume",
    "compile": "kernels.compile",
    "config": "experiments",
    "config_file": "experiments",
    "config_name": "experiments",
    "corpus": "dataset",
    "data_dir": "dataset.path",
    "data_path": "dataset.path",
    "dataset_config_name": "dataset.config",
    "dataset_name": "dataset",
    "datasource": "dataset.path",
    "decay_lr": "schedule",
    "default_root_dir": "run_name",
    "devices": "device.processes",
    "dtype": "precision",
    "early_stopping_patience": "training.patience",
    "fp16": "precision",
    "gpus": "device",
    "lang_src": "dataset.source_column",
    "lang_tgt": "dataset.target_column",
    "logger": "tracking",
    "lr_decay": "schedule",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "mixed_precision": "precision",
    "model_basename": "run_name",
    "model_folder": "run_name",
    "model_name": "model",
    "model_name_or_path": "init_from",
    "model_size": "model",
    "model_type": "architecture",
    "name": "run_name",
    "norm_first": "architecture",
    "nproc_per_node": "device.processes",
    "num_processes": "device.processes",
    "optim": "optimizer",
    "out_dir": "run_name",
    "output_dir": "run_name",
    "preload": "resume",
    "pretrained": "init_from",
    "project": "experiment_name",
    "qkv_bias": "architecture",
    "report_to": "tracking",
    "resume_from": "resume",
    "resume_from_checkpoint": "resume",
    "scheduler": "schedule",
    "source_lang": "dataset.source_column",
    "src_vocab_size": "tokenizer.vocab_size",
    "target_lang": "dataset.target_column",
    "tf32": "precision",
    "tgt_vocab_size": "tokenizer.vocab_size",
    "tie_word_embeddings": "architecture",
    "tokenizer_file": "tokenizer.path",
    "torch_compile": "implementation.compile",
    "torch_dtype": "precision",
    "train_file": "dataset.path",
    "vocab": "tokenizer.vocab_size",
    "wandb": "tracking",
    "wandb_log": "tracking",
    "wandb_project": "experiment_name",
    "wandb_run_name": "run_name",
}

LARGEST = 1e30  # no setting needs more, and numbers above 3.4e38 overflow in fp32


def nearest(name: str, choices: list[str]) -> str | None:
    """The choice that was most likely meant by a misspelt name, or None."""
    if (synonym := SYNONYMS.get(name.lower())) in choices:
        return synonym
    begun = [choice for choice in choices if len(name) >= 3 and choice.lower().startswith(name.lower())]
    if len(begun) == 1:
        return begun[0]
    found = get_close_matches(name.lower(), [choice.lower() for choice in choices], n=1, cutoff=0.6)
    return next((choice for choice in choices if choice.lower() == found[0]), None) if found else None


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
        good = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < math.inf
        if good and self.minimum is not None:
            good = value >= self.minimum
        if good and self.above is not None:
            good = value > self.above
        if good and self.below is not None:
            good = value < self.below
        if good and abs(value) > LARGEST:
            raise ValueError(f"must be a number of at most {LARGEST:g}")
        if not good:
            bounds = [
                text
                for bound, text in (
                    (self.minimum, f"of at least {self.minimum}"),
                    (self.above, f"greater than {self.above}"),
                    (self.below, f"less than {self.below}"),
                )
                if bound is not None
            ]
            raise ValueError(" ".join(["must be a number", " and ".join(bounds)]) + (", or null" * self.optional))
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
            meant = nearest(str(value), list(self.choices))
            raise ValueError(f"must be one of {', '.join(self.choices)}" + (f"; did you mean {meant}?" * bool(meant)))
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
                meant = nearest(str(word), list(self.choices))
                hint = f"; did you mean {meant}?" if meant else ""
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
