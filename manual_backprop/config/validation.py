"""Turns a mapping, composed from `conf/` or read from `config.yaml`, into a `RunConfig`, or reports all violations.

`validate` depends on the mapping alone; `machine.missing_here` finds what the machine lacks (a path, a GPU).
`with_defaults` completes the config of an older version. Only that function imports OmegaConf, all else needs the
standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import accumulate
from os.path import normpath
from typing import Any, get_type_hints

from manual_backprop.common.errors import ConfigError
from manual_backprop.config.network import architecture_violations, heads_violation, positions_violations
from manual_backprop.config.other_programs import known_elsewhere
from manual_backprop.config.plugins import missing_plugins
from manual_backprop.config.rules import (
    GROUP_SYNONYMS,
    SYNONYMS,
    Tags,
    Text,
    Texts,
    did_you_mean,
    nearest,
    shown,
    whole,
)
from manual_backprop.config.schema import DEFAULT_NETWORK, EXPERIMENTS, RunConfig, shipped_folder
from manual_backprop.config.task_rules import CHECKS, cross_check

FIXED_VOCABULARIES = {"byte": 257, "gpt2": 50257}  # tokenizers that learn nothing; byte: 256 and the end of text
NO_DEFAULT = ("model", "dataset")  # a config without these groups is damaged, not old


@cache
def groups() -> dict[str, type]:
    """The groups of the configuration and their dataclasses."""
    hints = get_type_hints(RunConfig)
    return {key.name: hints[key.name] for key in fields(RunConfig) if is_dataclass(hints[key.name])}


@cache
def keys() -> dict[str, Field[Any]]:
    """Every key of the configuration, dotted, with its dataclass field."""
    found: dict[str, Field[Any]] = {}
    for key in fields(RunConfig):
        if key.name in groups():
            found |= {f"{key.name}.{inner.name}": inner for inner in fields(groups()[key.name])}
        else:
            found[key.name] = key
    return found


def suggestion(name: str) -> str | None:
    """The key or group that was most likely meant by an unknown name: first the same name in its group, then a synonym
    from another library, then the same name in another group, and last a similar name."""
    never_typed = ("plugins",)  # --plugin sets it
    candidates = [
        key for key in (*groups(), *keys(), EXPERIMENTS) if not key.endswith(".name") and key not in never_typed
    ]
    head, _, last = name.rpartition(".")
    if (key := _key_of(name)) is not None:
        return key.removesuffix(".name")  # the choice of the group sets it
    plain = last.lower().replace("-", "_")
    spellings = (last, plain, SYNONYMS.get(plain, plain))
    for spelling in spellings:
        if f"{head}.{spelling}" in candidates:
            return f"{head}.{spelling}"
    if plain in GROUP_SYNONYMS:
        return GROUP_SYNONYMS[plain]
    places = {key.rpartition(".")[2]: key for key in reversed(candidates)}
    # If several keys have the same name, one at the top level comes first, then the optimizer's.
    places |= {key.rpartition(".")[2]: key for key in candidates if key.startswith("optimizer.")}
    places |= {key: key for key in candidates if "." not in key}
    for spelling in spellings:
        if spelling in places:
            return places[spelling]
    siblings = [key.rpartition(".")[2] for key in candidates if head and key.startswith(head + ".")]
    if (meant := nearest(last, siblings)) is not None:
        return f"{head}.{meant}"
    if head and head not in groups() and (group := nearest(head, list(groups()))) is not None:
        return suggestion(f"{group}.{last}")
    return places[meant] if (meant := nearest(last, list(places), likeness=0.75)) is not None else None


def _key_of(name: str) -> str | None:
    """The key that a name is, or below which it is, as in tags.a.b or seed.a."""
    return next((key for key in accumulate(name.split("."), "{}.{}".format) if key in keys()), None)


def is_text(key: str) -> bool:
    """Whether a key holds text, tags or a list of texts, so that a typed value is never a number."""
    known = keys().get("tags" if key.startswith("tags.") else key)
    return known is not None and isinstance(known.metadata["rule"], Text | Texts | Tags)


def validate(mapping: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of a mapping. Raises ConfigError with one sentence for each violation: key, value, rule."""
    if violations := missing_plugins(mapping.get("plugins")):
        raise ConfigError(violations)
    known: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for name, value in mapping.items():
        if name not in {key.name for key in fields(RunConfig)}:
            violations.append(unknown(str(name), value))
    for key in fields(RunConfig):
        if key.name in groups():
            if key.name in mapping or key.default is MISSING:
                arguments[key.name] = _read_group(key.name, mapping.get(key.name), known, violations)
        else:
            arguments[key.name] = _read(key.name, key, mapping, known, violations)
    for needed, check in CHECKS:
        if all(name in known for name in needed):
            violations += check(*(known[name] for name in needed))
    if violations:
        raise ConfigError(violations)
    return RunConfig(**arguments)


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run from an older version, with the groups and keys that were added since.

    A missing group gets the default option of conf/config.yaml. A missing key gets the value from the file of its
    group's option, or of the default option if the group names none. So a new group or key needs a default that means
    what older versions did. Existing values stay, valid or not; an empty config stays empty.
    """
    if not saved:
        return {}
    added = {group: values for group, cls in groups().items() if (values := _added(group, cls, saved))}
    complete = dict(saved) | {group: {**saved.get(group, {}), **values} for group, values in added.items()}
    for group, values in added.items():
        for name, value in values.items():
            if isinstance(value, str) and value.startswith("${"):  # ${model.learning_rate}
                other, _, key = value[2:-1].partition(".")
                source = complete.get(other)
                complete[group][name] = source.get(key) if isinstance(source, Mapping) else None
    return complete


def _added(group: str, cls: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a group that an old config lacks, with their values from conf/. The group `model` is left out, since
    the sizes of one model cannot be defaults of another; a new key of it has its default in `ModelConfig`."""
    there = saved.get(group, {})
    if not isinstance(there, Mapping) or group == "model" or (group in NO_DEFAULT and group not in saved):
        return {}
    option = there.get("name")
    absent = {
        key.name for key in fields(cls) if not (only := key.metadata["only_for"]) or option in only
    } - there.keys()
    if not absent:
        return {}
    known = option is not None and option in keys()[f"{group}.name"].metadata["rule"].choices
    content = _shipped(f"{group}/{option if known else _default_options().get(group)}")
    return {name: value for name, value in content.items() if group not in saved or name in absent}


@cache
def _default_options() -> dict[str, str]:
    """The default option of each group, from conf/config.yaml."""
    listed = _shipped("config").get("defaults", [])
    return {str(group): str(option) for entry in listed if isinstance(entry, dict) for group, option in entry.items()}


@cache
def _shipped(name: str) -> dict[str, Any]:
    """The content of a file of conf/, unresolved; empty if there is no such file."""
    from omegaconf import OmegaConf

    path = shipped_folder("conf") / f"{name}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def other_setting(name: str, value: str | None) -> str | None:
    """`known_elsewhere`, but None below a key of ours: seed.compile is no setting of another program."""
    return known_elsewhere(name, value) if _key_of(name) in (None, name) else None


def unknown(name: str, value: Any) -> str:
    ending = other_setting(name, shown(value)) or did_you_mean(suggestion(name))
    return f"{shown(name)}={shown(value)}: there is no such key{ending}"


def _read_group(group: str, mapping: Any, known: dict[str, Any], violations: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        if mapping is None:
            violations.append(f"{group}: is missing; every run needs one")
        else:
            violations.append(f"{group}={shown(mapping)}: must be the keys of one of its options, from conf/{group}")
        return None
    cls = groups()[group]
    inner = {key.name: key for key in fields(cls)}
    for name, value in mapping.items():
        if name not in inner:
            violations.append(unknown(f"{group}.{name}", value))
    return cls(
        **{
            name: _read(f"{group}.{name}", key, mapping, known, violations, mapping.get("name"))
            for name, key in inner.items()
        }
    )


def _read(
    name: str,
    key: Field[Any],
    mapping: Mapping[str, Any],
    known: dict[str, Any],
    violations: list[str],
    option: Any = None,
) -> Any:
    """The value of one key; if it is not valid, None, and a violation is added."""
    only_for = key.metadata["only_for"]
    value = mapping.get(key.name)
    group = name.partition(".")[0]
    if only_for and option not in keys()[f"{group}.name"].metadata["rule"].choices:
        return None  # the option itself is reported
    if only_for and option not in only_for:
        if value is not None:
            violations.append(
                f"{name}={shown(value)}: only {group}={' or '.join(only_for)} has this key, and {group}="
                f"{shown(option)} was chosen; leave it out, or choose {group}={only_for[0]}"
            )
        else:
            known[name] = None
        return None
    if key.name not in mapping:
        has_default = key.default is not MISSING or key.default_factory is not MISSING
        if not has_default or (only_for and not key.metadata["rule"].optional):
            violations.append(f"{name}: is missing; {key.metadata['about']}")
            return None
        known[name] = key.default_factory() if key.default_factory is not MISSING else key.default
        return known[name]
    try:
        known[name] = key.metadata["rule"].read(value)
    except ValueError as error:
        violations.append(f"{name}={shown(value)}: {error}{_hint(name, value)}")
        return None
    return known[name]


def _hint(name: str, value: Any) -> str:
    if isinstance(keys()[name].metadata["rule"], Text) and isinstance(value, float | bool):
        return f"; quotes inside quotes make it text: \"{name}='...'\""
    if name in ("dataset.path", "tokenizer.path") and value is None:
        return f"; say where it is: {name}=PATH"
    if name == "dataset.repository" and value is None:
        return "; say which dataset of the hub: dataset.name=OWNER/NAME"
    if name == "schedule.warmup_ratio" and (whole(value) or 0) >= 1:
        return f"; it is a share of all steps; did you mean schedule.warmup_steps={whole(value)}?"
    if name == "tokenizer.vocab_size":
        return "; a byte-level tokenizer needs the 256 bytes and an end token"
    return ""


# Rules between several keys. A check is called if all the keys that it needs are valid by themselves.


@cross_check("precision.name", "device.name")
def the_device_has_the_precision(precision: str, device: str) -> Iterator[str]:
    if (precision, device) == ("tf32", "cpu"):
        yield "precision=tf32: only an NVIDIA GPU has it, and this is device=cpu; use precision=fp32"


@cross_check("model.d_model", "model.n_heads")
def heads_share_the_width(d_model: int, n_heads: int) -> Iterator[str]:
    if d_model % n_heads:
        yield heads_violation(d_model, n_heads, "model.")


@cross_check("architecture.name", "architecture.activation", "model.d_model", "model.n_heads", "model.n_kv_heads")
def the_architecture_can_be_built(
    name: str, activation: str, d_model: int, n_heads: int, n_kv_heads: int | None
) -> Iterator[str]:
    if d_model % n_heads == 0:  # otherwise heads_share_the_width reports it
        for line in architecture_violations(name, activation, d_model, n_heads, n_kv_heads):
            yield f"architecture.{line}" if line.startswith("activation") else f"model.{line}"


@cross_check("architecture.name", "model.positions")
def the_architecture_has_these_positions(name: str, positions: str | None) -> Iterator[str]:
    for line in positions_violations(name, positions):
        yield f"model.{line}"


@cross_check("network", "task.name", "model.n_encoder_blocks")
def there_is_an_encoder(network: str | None, task: str, blocks: int | None) -> Iterator[str]:
    if blocks is not None and (network or DEFAULT_NETWORK[task]) == "decoder":
        yield f"model.n_encoder_blocks={blocks}: network=decoder has no encoder; leave it null, or use another network"


@cross_check("model.vocab_size", "tokenizer.name", "tokenizer.vocab_size")
def the_vocabulary_holds_the_tokens(vocab_size: int | None, tokenizer: str, tokens: int | None) -> Iterator[str]:
    tokens = FIXED_VOCABULARIES.get(tokenizer, tokens)
    if vocab_size is not None and tokens is not None and vocab_size < tokens:
        yield (
            f"model.vocab_size={vocab_size}: must be at least the {tokens} tokens of tokenizer={tokenizer}; say "
            "model.vocab_size=null for exactly as many" + (", or lower tokenizer.vocab_size" * (tokenizer == "bpe"))
        )


@cross_check("device.processes", "training.batch_size", "training.gradient_accumulation_steps")
def processes_share_a_step(processes: int, batch_size: int, pieces: int) -> Iterator[str]:
    if (batch_size * pieces) % processes:
        rows = f"training.batch_size={batch_size}" + f" x training.gradient_accumulation_steps={pieces}" * (pieces > 1)
        yield (
            f"device.processes={processes}: must divide the rows of an optimizer step, {rows} = {batch_size * pieces}"
        )


@cross_check("optimizer.sharded", "implementation.name")
def only_our_optimizers_are_sharded(sharded: bool | str, implementation: str) -> Iterator[str]:
    if sharded is True and implementation != "custom":
        yield (
            f"optimizer.sharded=true: implementation={implementation} trains with PyTorch's own optimizer, which "
            "stores all moments in every process; leave it at auto, or use implementation=custom"
        )


@cross_check("batching.name", "dataset.max_length", "model.max_seq_len")
def a_padded_row_is_a_sequence(batching: str, max_length: int | None, max_seq_len: int) -> Iterator[str]:
    if batching == "padded" and max_length is not None and max_length > max_seq_len:
        yield (
            f"dataset.max_length={max_length}: with batching=padded a row is a document of at most model.max_seq_len="
            f"{max_seq_len} tokens; use at most that, leave it null, or use batching=packed"
        )


@cross_check("dataset.path", "dataset.test")
def a_test_text_is_another_one(path: str | None, test: str | None) -> Iterator[str]:
    if path is not None and test is not None and normpath(path) == normpath(test):
        yield f"dataset.test={shown(test)}: is the training text; give another file or folder, or leave it out"


@cross_check("dataset.streaming", "dataset.subset_size")
def a_stream_has_an_end(streaming: bool | None, subset_size: int | None) -> Iterator[str]:
    if streaming and subset_size is None:
        yield (
            "dataset.subset_size=null: a stream is stored on disk as tokens, so that a run can be resumed, and needs "
            "an end; give the number of documents, or dataset.streaming=false to download all of them"
        )


@cross_check("dataset.name", "dataset.validation")
def files_have_no_splits(name: str, validation: float | str | None) -> Iterator[str]:
    if isinstance(validation, str) and name in ("python_docs", "text", "jsonl", "parquet", "dates", "postfix"):
        yield (
            f"dataset.validation={shown(validation)}: dataset={name} has no named splits; give the share of the "
            "validation split, as in dataset.validation=0.05"
        )


@cross_check("dataset.name", "dataset.subset_size", "dataset.validation", "dataset.on_bad_row")
def prepared_tokens_are_taken_as_they_are(
    name: str, subset_size: int | None, validation: float | str | None, on_bad_row: str
) -> Iterator[str]:
    if name != "pretokenized":
        return
    given = {"subset_size": subset_size, "validation": validation}
    given |= {"on_bad_row": None if on_bad_row == "error" else on_bad_row}
    for key, value in given.items():
        if value is not None:
            yield (
                f"dataset.{key}={shown(value)}: the documents and splits of dataset=pretokenized were fixed when it "
                "was tokenized; leave it out, or tokenize again"
            )


@cross_check("dataset.name", "tokenizer.name")
def prepared_tokens_have_their_tokenizer(dataset: str, tokenizer: str) -> Iterator[str]:
    if dataset == "pretokenized" and tokenizer in ("bpe", "char"):
        yield (
            f"tokenizer={tokenizer}: is learned from a text, and dataset=pretokenized was tokenized already; add "
            "tokenizer=pretokenized"
        )
    if dataset != "pretokenized" and tokenizer == "pretokenized":
        yield (
            f"tokenizer=pretokenized: belongs to dataset=pretokenized, and dataset={dataset} was chosen; use bpe, "
            "byte, char, file or gpt2"
        )


@cross_check("training.max_steps", "training.num_epochs")
def one_length(max_steps: int | None, num_epochs: float | None) -> Iterator[str]:
    if max_steps is None and num_epochs is None:
        yield "training.max_steps=null: either it or training.num_epochs must be given"
    if max_steps is not None and num_epochs is not None:
        yield (
            f"training.num_epochs={num_epochs:g}: only one of it and training.max_steps={max_steps} may be given; "
            "leave one out"
        )


@cross_check("training.max_steps", "schedule.warmup_ratio", "schedule.warmup_steps")
def warm_up_ends_before_the_run(max_steps: int | None, warmup_ratio: float, warmup_steps: int | None) -> Iterator[str]:
    if max_steps is None:
        return
    if warmup_steps is None and round(warmup_ratio * max_steps) >= max_steps:
        yield (
            f"schedule.warmup_ratio={warmup_ratio:g}: warms up for all of training.max_steps={max_steps}; at least one "
            "step must be left"
        )
    if warmup_steps is not None and warmup_steps >= max_steps:
        yield (
            f"schedule.warmup_steps={warmup_steps}: must be less than training.max_steps={max_steps}, so that at least "
            "one step is left after warm-up; give fewer, or more training.max_steps"
        )


@cross_check("schedule.name", "optimizer.name", "optimizer.learning_rate", "model.learning_rate")
def noam_has_its_own_peak(schedule: str, optimizer: str, learning_rate: float, models: float) -> Iterator[str]:
    if schedule == "noam" and optimizer == "adamw" and learning_rate != models:
        yield (
            f"optimizer.learning_rate={learning_rate:g}: schedule=noam has a peak of its own; did you mean "
            f"schedule.peak={learning_rate:g}?"
        )


@cross_check("training.patience", "schedule.patience")
def the_rate_is_lowered_before_the_end(patience: int | None, lowers: int | None) -> Iterator[str]:
    if patience is not None and lowers is not None and lowers >= patience:
        yield (
            f"training.patience={patience}: ends the run before schedule.patience={lowers} evaluations could lower the "
            "rate; give a longer one, or a shorter schedule.patience"
        )


@cross_check("schedule.min_learning_rate", "optimizer.learning_rate", "architecture.learning_rate_scale")
def the_rate_falls(smallest: float | None, learning_rate: float, scale: float) -> Iterator[str]:
    if smallest is not None and smallest > learning_rate * scale:
        product = "" if scale == 1 else f" x architecture.learning_rate_scale={scale:g} = {learning_rate * scale:g}"
        yield (
            f"schedule.min_learning_rate={smallest:g}: must not be above the highest rate, optimizer.learning_rate="
            f"{learning_rate:g}{product}"
        )
