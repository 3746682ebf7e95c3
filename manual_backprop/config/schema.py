"""Everything that can be configured, as data: dataclasses, and the rule of every key.

Imports the standard library only, so that a typo is reported before torch is imported. What a key means stands beside
it; its unit stands in brackets. `conf/` holds the shipped values, this file what they may be, `validation.py` what only
shows across keys.

A network sees only `CustomTransformerConfig` (`network.py`); the runner sees `RunConfig`, which mirrors the
groups of `conf/`.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from manual_backprop.config.network import (
    ACTIVATIONS,
    ARCHITECTURES,
    COMPILE,
    KERNELS,
    NORM_EPSILON_RULE,
    POSITIONS,
    PRECISIONS,
    RECOMPUTE,
    ROTARY_BASE_RULE,
    CustomTransformerConfig,
)
from manual_backprop.config.rules import (
    Betas,
    Flag,
    FlagOrAuto,
    Number,
    Rule,
    Share,
    Tags,
    Text,
    Texts,
    Whole,
    Word,
    Words,
)

IMPLEMENTATIONS = ("custom", "torch", "baseline")
SEQUENCES = ("reversal", "copy", "sort")  # tasks that make their own examples: a row of symbols, and what becomes of it
NETWORKS = ("decoder", "encoder", "encoder_decoder")
FORECASTING = ("forecasting",)  # tasks that read a series of numbers
TASK_NAMES = ["language_model", *SEQUENCES, "translation", *FORECASTING, "classification"]  # and the registered ones
USUAL_NETWORK = {"language_model": "decoder", "forecasting": "encoder", "classification": "encoder"}
USUAL_NETWORK |= dict.fromkeys((*SEQUENCES, "translation"), "encoder_decoder")


def setting(rule: Rule, about: str, *, default: Any = MISSING, only_for: tuple[str, ...] = ()) -> Any:
    """A key of the configuration: its rule, and what it means (with its unit in brackets) for `--help` and errors.

    `only_for`: the options of the group that have this key; with the others it is None.
    """
    metadata = {"rule": rule, "about": about, "only_for": only_for}
    if only_for:
        default = None
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


def option_name(*choices: str) -> Any:
    return _named(choices)


def _named(choices: Sequence[str]) -> Any:
    return setting(Word(choices), "set by the choice of the group")


FILES = ("jsonl", "parquet", "saved")  # datasets in files of the user's, with columns
PAIRS = ("pairs", "dates", "postfix")  # sources and targets
LABELLED = ("labelled", "docstrings")  # texts with a label each
PAIR_FORMATS = ("tsv", "jsonl", "parquet", "lines", "saved", "hub")
SERIES = ("series", "co2")  # datasets of numbers over time
LABELLED_FORMATS = ("jsonl", "csv", "tsv", "parquet", "saved", "hub")
WITH_FORMAT = ("pairs", "labelled")  # the user's own, in files of several formats or on the hub
HUB = ("hub", "tinystories", "tiny_textbooks", "tiny_strange_textbooks", "tiny_codes", "fineweb", "wikitext")

# The groups of conf/, one dataclass a noun.


@dataclass(frozen=True)
class TaskConfig:
    name: str = _named(TASK_NAMES)
    min_length: int | None = setting(Whole(1, 10**4), "of a row's source [symbols]", only_for=SEQUENCES)
    max_length: int | None = setting(Whole(1, 10**4), "of a row's source [symbols]", only_for=SEQUENCES)
    symbols: int | None = setting(Whole(2, 10**6), "numbers from 0 on that rows are made of", only_for=SEQUENCES)
    training_rows: int | None = setting(Whole(1, 10**8), "of an epoch", only_for=SEQUENCES)
    validation_rows: int | None = setting(Whole(1, 10**6), "that choose the best checkpoint", only_for=SEQUENCES)
    test_rows: int | None = setting(Whole(1, 10**6), "that the end of a run is measured on", only_for=SEQUENCES)
    shared_tokenizer: bool | None = setting(
        Flag(), "one for sources and targets, learned from both; false: one for each", only_for=("translation",)
    )
    history: int | None = setting(
        Whole(1, 10**5), "of a series, what a forecast is made of [steps]", only_for=FORECASTING
    )
    horizon: int | None = setting(Whole(1, 10**5), "that are forecast, all at once [steps]", only_for=FORECASTING)
    season: int | None = setting(
        Whole(1, 10**5, optional=True), "after which a series is like itself; null: none [steps]", only_for=FORECASTING
    )
    patch: int | None = setting(Whole(1, 10**4), "of the history that are one position [steps]", only_for=FORECASTING)


@dataclass(frozen=True)
class ModelConfig:
    d_model: int = setting(Whole(1, 10**6), "D, width of the residual stream")
    n_blocks: int = setting(Whole(1, 10**4), "L, number of blocks")
    n_heads: int = setting(Whole(1, 10**6), "H, attention heads of a block; divides d_model")
    d_ffn: int = setting(Whole(1, 10**7), "F, width of the feed-forward network's hidden layer")
    max_seq_len: int = setting(Whole(1, 10**7), "T, length of a sequence [tokens]")
    dropout: float = setting(Number(minimum=0, below=1), "probability that an element is dropped, in training")
    vocab_size: int | None = setting(Whole(1, 10**8, optional=True), "V [tokens]; null: the tokenizer's")
    learning_rate: float = setting(Number(above=0), "what suits this size with AdamW")
    n_kv_heads: int | None = setting(
        Whole(1, 10**6, optional=True),
        "G, heads of keys and values, for architecture=llama; divides n_heads; null: H",
        default=None,
    )
    n_encoder_blocks: int | None = setting(
        Whole(1, 10**4, optional=True), "blocks of an encoder, where there is one; null: n_blocks", default=None
    )
    positions: str | None = setting(
        Word(POSITIONS, optional=True),
        "how a network knows where a token stands: none (a control), learned, sinusoidal, or rotary (llama); null: the "
        "architecture's own",
        default=None,
    )


@dataclass(frozen=True)
class ArchitectureConfig:
    name: str = option_name(*ARCHITECTURES)
    activation: str = setting(Word(ACTIVATIONS), "of the feed-forward network: " + ", ".join(ACTIVATIONS))
    learning_rate_scale: float = setting(Number(above=0), "times the learning rate: post-norm wants less than pre-norm")
    norm_epsilon: float | None = setting(
        NORM_EPSILON_RULE,
        "added to what a norm takes the root of; null: 1e-5 in layer norm, 1e-6 in RMSNorm",
        default=None,
    )
    rotary_base: float | None = setting(
        ROTARY_BASE_RULE,
        "pair i of a head turns by base^(-2i / K) [radians a position]; null: 10000",
        only_for=("llama",),
    )


@dataclass(frozen=True)
class DatasetConfig:
    name: str = option_name("python_docs", "text", *FILES, "pretokenized", *HUB, *PAIRS, *SERIES, *LABELLED, "none")
    path: str | None = setting(
        Text(), "a file or a folder", only_for=("text", *FILES, "pretokenized", "pairs", "series", "labelled")
    )
    repository: str | None = setting(Text(), "OWNER/NAME on the hub; dataset.name=OWNER/NAME is the same", only_for=HUB)
    config: str | None = setting(
        Text(optional=True), "where a dataset has several; null: its own", only_for=(*HUB, *WITH_FORMAT)
    )
    revision: str | None = setting(
        Text(optional=True), "a commit, branch or tag of the hub; null: the newest", only_for=(*HUB, *WITH_FORMAT)
    )
    streaming: bool | None = setting(
        Flag(optional=True), "take subset_size documents from the hub without downloading all", only_for=HUB
    )
    split: str | None = setting(Text(optional=True), "to train on; null: train", only_for=("saved", *HUB, *WITH_FORMAT))
    text_column: str | None = setting(
        Text(optional=True), "holds the text; null: text", only_for=(*FILES, *HUB, "labelled")
    )
    label_column: str | None = setting(
        Text(optional=True), "holds the labels, texts or whole numbers; null: label", only_for=("labelled",)
    )
    augment: tuple[str, ...] | None = setting(
        Words(("swap", "delete", "insert")),
        "of training texts a tenth of the words in each epoch: swap, delete, insert, or several; null: none",
        only_for=LABELLED,
    )
    format: str | None = setting(
        Word(tuple(dict.fromkeys((*PAIR_FORMATS, *LABELLED_FORMATS))), optional=True),
        f"of pairs {', '.join(PAIR_FORMATS)} (lines: two files, PATH.SOURCE_COLUMN and PATH.TARGET_COLUMN), of "
        f"labelled {', '.join(LABELLED_FORMATS)}; null: by the name",
        only_for=WITH_FORMAT,
    )
    source_column: str | None = setting(
        Text(optional=True), "holds the sources: a name, in tsv also its number; null: source", only_for=("pairs",)
    )
    target_column: str | None = setting(
        Text(optional=True), "holds the targets: a name, in tsv also its number; null: target", only_for=("pairs",)
    )
    languages: tuple[str, ...] | None = setting(
        Texts(), "that English dates are translated to, as CLDR names them", only_for=("dates",)
    )
    subset_size: int | None = setting(
        Whole(2, optional=True), "of training documents, the first so many; null: all", default=None
    )
    validation: float | str | None = setting(
        Share(),
        "a share of the documents, or a split's name, of pairs and labelled also a file; null: the split of that kind, "
        "or a tenth",
        default=None,
    )
    test: str | None = setting(
        Text(optional=True),
        "what evaluate --split test reads: a file or a folder, of saved and hub a split's name; null: test, if there",
        only_for=("text", *FILES, *HUB, *WITH_FORMAT),
    )
    max_length: int | None = setting(
        Whole(2, optional=True),
        "longer documents are cut [tokens]; null: never packed, padded at model.max_seq_len",
        default=None,
    )
    on_bad_row: str = setting(
        Word(("error", "skip")),
        "what cannot be read: ends the run, or is left out and counted; of texts up to 1 %",
        default="error",
    )
    time_column: str | None = setting(Text(optional=True), "of a series; null: the first one", only_for=("series",))
    value_columns: tuple[str, ...] | None = setting(
        Texts(optional=True), "of a series, what is forecast; null: all but the time", only_for=("series",)
    )
    test_share: float | None = setting(
        Number(above=0, below=1, optional=True),
        "on which no run trains: of a series its last steps, of labelled texts some of each label (null: none)",
        only_for=(*SERIES, *LABELLED),
    )


@dataclass(frozen=True)
class TokenizerConfig:
    name: str = option_name("bpe", "byte", "char", "file", "gpt2", "pretokenized", "none")
    vocab_size: int | None = setting(Whole(257, 10**6), "how many tokens bpe learns, bytes included", only_for=("bpe",))
    path: str | None = setting(Text(), "a folder with tokenizer.json", only_for=("file",))
    source_path: str | None = setting(
        Text(optional=True), "of translation: that of the sources; null: that of the targets", only_for=("file",)
    )
    repository: str | None = setting(Text(), "OWNER/NAME on the hub, with tokenizer.json", only_for=("gpt2",))
    revision: str | None = setting(Text(optional=True), "its commit, branch or tag", only_for=("gpt2",))


@dataclass(frozen=True)
class BatchingConfig:
    name: str = option_name("packed", "padded")
    mask_documents: bool | None = setting(
        Flag(optional=True), "positions attend within their own document only", only_for=("packed",)
    )


@dataclass(frozen=True)
class PrecisionConfig:
    name: str = option_name(*PRECISIONS)


@dataclass(frozen=True)
class DeviceConfig:
    name: str = option_name("auto", "cpu", "cuda")
    threads: int | None = setting(
        Whole(1, 4096, optional=True), "of the CPU, of each process; null: its cores, shared among the processes"
    )
    processes: int = setting(
        Whole(1, 1024),
        "of this machine that share the training's batches; see torchrun for several machines",
        default=1,
    )
    index: int | None = setting(Whole(0, 1023, optional=True), "which GPU, from 0; null: the first", only_for=("cuda",))
    deterministic: bool | None = setting(
        Flag(optional=True), "the same bits in every run on a GPU, which takes more time", only_for=("auto", "cuda")
    )


@dataclass(frozen=True)
class ImplementationConfig:
    name: str = option_name(*IMPLEMENTATIONS)
    compile: str | None = setting(
        Word(COMPILE), "the step with torch.compile: auto (on a GPU), always, never", only_for=("baseline",)
    )


@dataclass(frozen=True)
class KernelsConfig:
    name: str = option_name(*KERNELS)
    compile: str | None = setting(
        Word(COMPILE),
        "small functions: auto (on a GPU, or where there is a C++ compiler), always, never",
        only_for=("fused",),
    )


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = option_name("adamw", "sgd")
    learning_rate: float = setting(Number(above=0), "the highest, after warm-up; adamw takes model.learning_rate")
    weight_decay: float = setting(Number(minimum=0), "of the matrices")
    betas: tuple[float, float] | None = setting(Betas(), "decay of the two moments", only_for=("adamw",))
    epsilon: float | None = setting(Number(above=0), "added to the root of the second moment", only_for=("adamw",))
    momentum: float | None = setting(Number(minimum=0, below=1), "share of the last step kept", only_for=("sgd",))
    sharded: bool | str = setting(
        FlagOrAuto(), "of several processes each keeps the moments of its part; auto: where it can", default="auto"
    )


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = option_name("cosine", "linear", "constant", "noam", "plateau")
    warmup_ratio: float = setting(Number(minimum=0, below=1), "share of all steps in which the rate rises")
    warmup_steps: int | None = setting(
        Whole(0, optional=True), "[optimizer steps] in which the rate rises; null: warmup_ratio of all", default=None
    )
    min_learning_rate: float | None = setting(
        Number(minimum=0, optional=True),
        "where the rate ends; null: a tenth of the highest",
        only_for=("cosine", "linear", "plateau"),
    )
    peak: float | None = setting(
        Number(above=0, optional=True),
        "the highest rate; null: the paper's, (D x steps of warm-up)^-0.5; optimizer.learning_rate has no part in it",
        only_for=("noam",),
    )
    factor: float | None = setting(
        Number(above=0, below=1), "times which the rate is taken when nothing improves", only_for=("plateau",)
    )
    patience: int | None = setting(
        Whole(1), "evaluations without a better one, after which the rate is lowered", only_for=("plateau",)
    )


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = setting(Whole(1, 10**6), "B, of one forward pass [sequences]")
    gradient_accumulation_steps: int = setting(Whole(1, 10**6), "forward passes of an optimizer step")
    max_steps: int | None = setting(Whole(1, optional=True), "[optimizer steps]; this or num_epochs, the other null")
    num_epochs: float | None = setting(Number(above=0, optional=True), "times through the training split")
    max_grad_norm: float | None = setting(
        Number(above=0, optional=True), "a longer gradient is scaled to it; null: never"
    )
    label_smoothing: float = setting(Number(minimum=0, below=1), "share of the target spread over the vocabulary")
    eval_every: int | str = setting(Whole(word="epoch"), "[steps], or the word epoch")
    log_every: int | str = setting(Whole(word="epoch"), "[steps], or the word epoch")
    save_every: int | str = setting(Whole(word="epoch"), "[steps], or the word epoch")
    eval_batches: int | None = setting(
        Whole(1, optional=True), "of the periodic evaluations; null: the whole split, as at the end"
    )
    keep_checkpoints: int = setting(Whole(1, 10**6), "the newest ones; the best is kept besides")
    sample_prompts: tuple[str, ...] = setting(Texts(), "texts that every evaluation continues")
    sample_length: int = setting(Whole(0, 10**6), "of each sample [tokens]")
    non_finite: str = setting(Word(("raise", "skip")), "what a step does whose loss or gradient is not finite")
    non_finite_limit: int = setting(Whole(1), "skipped steps in a row that end a run")
    overfit_batches: int | None = setting(
        Whole(1, optional=True), "train on the first N batches again and again; null: on all", default=None
    )
    save_every_minutes: float | None = setting(
        Number(above=0, optional=True), "save as well when so many have passed since the last save", default=None
    )
    recompute: str = setting(
        Word(RECOMPUTE),
        "what backward recomputes instead of keeping it: none, or block, all but each block's input",
        default="none",
    )
    patience: int | None = setting(
        Whole(1, optional=True),
        "evaluations in a row without a better one that end a run early; null: it goes on to its last step",
        default=None,
    )
    inspect_every: int | None = setting(
        Whole(1, optional=True),
        "[steps] between two looks into every layer (inspect/ metrics, pictures); null: none",
        default=None,
    )


@dataclass(frozen=True)
class TrackingConfig:
    name: str = option_name("mlflow", "none")


@dataclass(frozen=True)
class SweepConfig:
    resume: str | None = setting(
        Text(optional=True), "a sweep's directory or id, or last: run what has not finished; no other key may be given"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `validation.validate` makes one of a mapping, or says everything that is wrong with it.

    A group with a default did not always exist: runs that lack it were made with that.
    """

    task: TaskConfig = TaskConfig("language_model")
    model: ModelConfig
    architecture: ArchitectureConfig
    dataset: DatasetConfig
    tokenizer: TokenizerConfig
    batching: BatchingConfig
    precision: PrecisionConfig
    device: DeviceConfig
    implementation: ImplementationConfig
    kernels: KernelsConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    tracking: TrackingConfig
    sweep: SweepConfig
    experiment_name: str = setting(Text(maximum=200), "the MLflow experiment", default="manual_backprop")
    network: str | None = setting(
        Word(NETWORKS, optional=True), f"{', '.join(NETWORKS)}; null: the task's usual one", default=None
    )
    run_name: str | None = setting(
        Text(optional=True, maximum=100, forbidden="/\\"),
        "null: made of the model, the architecture and the dataset",
        default=None,
    )
    seed: int = setting(Whole(0, 2**32 - 1), "of the weights, the order of the data, dropout and samples", default=0)
    resume: str | None = setting(
        Text(optional=True), "last, best, a run id, or the path of a run or a checkpoint", default=None
    )
    init_from: str | None = setting(
        Text(optional=True),
        "start from the weights of a run, a checkpoint or what convert made, which sets sizes and tokenizer",
        default=None,
    )
    tags: dict[str, str] = field(
        default_factory=dict,
        metadata={"rule": Tags(), "about": "of the MLflow run, as in tags.note=first", "only_for": ()},
    )
    plan: bool = setting(Flag(), "say what would be run, and stop", default=False)
    plugins: tuple[str, ...] = setting(Texts(), "modules that --plugin has named; recorded, never imported", default=())

    @property
    def network_name(self) -> str:
        """decoder, encoder or encoder_decoder."""
        return self.network or USUAL_NETWORK[self.task.name]

    def network_config(self, vocab_size: int, **fields: Any) -> CustomTransformerConfig:
        """The network of this run, where `model.vocab_size` leaves it to the tokenizer: with `vocab_size` tokens.
        `fields`: what else of the network its task decides."""
        model = self.model
        symbols = {"padding_token_id": self.task.symbols}  # where there are symbols, padding comes after them
        return CustomTransformerConfig(
            **(symbols | fields),
            vocab_size=model.vocab_size or vocab_size,
            d_model=model.d_model,
            n_blocks=model.n_blocks,
            n_heads=model.n_heads,
            d_ffn=model.d_ffn,
            max_seq_len=model.max_seq_len,
            network=self.network_name,
            n_kv_heads=model.n_kv_heads,
            n_encoder_blocks=model.n_encoder_blocks,
            positions=model.positions,
            dropout=model.dropout,
            architecture=self.architecture.name,
            activation=self.architecture.activation,
            norm_epsilon=self.architecture.norm_epsilon,
            rotary_base=self.architecture.rotary_base,
            label_smoothing=self.training.label_smoothing,
            precision=self.precision.name,
            kernels=self.kernels.name,
            device=f"cuda:{self.device.index}" if self.device.index else self.device.name,
            seed=self.seed,
            recompute=self.training.recompute,
            compile=self.implementation.compile or self.kernels.compile or "auto",
        )

    @property
    def peak_learning_rate(self) -> float:
        """The highest of the whole run, after warm-up."""
        return self.optimizer.learning_rate * self.architecture.learning_rate_scale

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, lists, numbers and texts, as in `config.yaml`; `validate` makes the same RunConfig of it.

        Keys that the chosen option of their group does not have are left out.
        """
        return _plain(self)


def _plain(config: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key in fields(config):
        value = getattr(config, key.name)
        only_for = key.metadata.get("only_for")
        if only_for and config.name not in only_for:
            continue
        if is_dataclass(value):
            plain[key.name] = _plain(value)
        elif isinstance(value, tuple):
            plain[key.name] = list(value)
        else:
            plain[key.name] = dict(value) if isinstance(value, dict) else value
    return plain


def shipped_folder(name: str) -> Path:
    """`conf` or `experiments`: beside the package in a checkout, inside it when it is installed."""
    package = Path(__file__).resolve().parents[1]
    return next((folder for folder in (package / name, package.parent / name) if folder.is_dir()), package / name)


def model_sizes() -> dict[str, dict[str, int | float | None]]:
    """The options of `conf/model`, by name. Their lines are `key: number`."""
    return {
        path.stem: {key: _number(text) for key, text in option_values("model", path.stem).items()}
        for path in sorted(shipped_folder("conf").glob("model/*.yaml"))
    }


def option_values(group: str, option: str) -> dict[str, str]:
    """What `conf/GROUP/OPTION.yaml` sets, as it is written there: flat lines `key: value`, read without a YAML
    library."""
    text = (shipped_folder("conf") / group / f"{option}.yaml").read_text(encoding="utf-8")
    pairs = (line.split("#")[0].partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def _number(text: str) -> int | float | None:
    if text == "null":
        return None
    return int(text) if text.isdecimal() else float(text)
