"""The configuration of a run as dataclasses: every key with its rule, its meaning, and its unit in brackets.

Imports the standard library only, so that a typo is reported before torch is imported. `conf/` holds the shipped
values, this file the allowed ones, and `validation.py` the rules between several keys.

The runner takes a `RunConfig`, which mirrors the groups of `conf/`; a network takes only a `CustomTransformerConfig`
(`network.py`).
"""

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from manual_backprop.config.network import (
    ACTIVATIONS,
    ARCHITECTURES,
    COMPILE,
    KERNELS,
    NETWORKS,
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

EXPERIMENTS = "experiments"  # the folder, and the key that chooses one of its files
IMPLEMENTATIONS = ("custom", "torch", "baseline")
SEQUENCES = ("reversal", "copy", "sort")  # tasks that generate their own pairs of symbol sequences
FORECASTING = ("forecasting",)  # tasks that read time series
TASK_NAMES = ["language_model", *SEQUENCES, "translation", *FORECASTING, "classification"]  # and registered ones
DEFAULT_NETWORK = {"language_model": "decoder", "forecasting": "encoder", "classification": "encoder"}
DEFAULT_NETWORK |= dict.fromkeys((*SEQUENCES, "translation"), "encoder_decoder")


def setting(rule: Rule, about: str, *, default: Any = MISSING, only_for: tuple[str, ...] = ()) -> Any:
    """A dataclass field for a key: its rule, and its meaning (with its unit in brackets) for `--help` and errors.

    `only_for`: the options of the group that have this key; with all others the key is None.
    """
    metadata = {"rule": rule, "about": about, "only_for": only_for}
    if only_for:
        default = None
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


BY_CHOICE = "set by the choice of the group"


def option_name(*choices: str) -> Any:
    return setting(Word(choices), BY_CHOICE)


FILES = ("jsonl", "parquet", "saved")  # the user's files with columns
PAIRS = ("pairs", "dates", "postfix")  # datasets of sources and targets
LABELLED = ("labelled", "docstrings")  # datasets of texts with one label each
PAIR_FORMATS = ("tsv", "jsonl", "parquet", "lines", "saved", "hub")
SERIES = ("series", "co2")  # datasets of time series
LABELLED_FORMATS = ("jsonl", "csv", "tsv", "parquet", "saved", "hub")
WITH_FORMAT = ("pairs", "labelled")  # the user's own datasets, in files of several formats or on the hub
HUB = ("hub", "tinystories", "tiny_textbooks", "tiny_strange_textbooks", "tiny_codes", "fineweb", "wikitext")

# One dataclass for each group of conf/.


@dataclass(frozen=True)
class TaskConfig:
    name: str = setting(Word(TASK_NAMES), BY_CHOICE)
    min_length: int | None = setting(Whole(1, 10**4), "shortest source sequence [symbols]", only_for=SEQUENCES)
    max_length: int | None = setting(Whole(1, 10**4), "longest source sequence [symbols]", only_for=SEQUENCES)
    symbols: int | None = setting(Whole(2, 10**6), "number of different symbols in a sequence", only_for=SEQUENCES)
    training_rows: int | None = setting(Whole(1, 10**8), "examples of an epoch", only_for=SEQUENCES)
    validation_rows: int | None = setting(Whole(1, 10**6), "examples of the validation split", only_for=SEQUENCES)
    test_rows: int | None = setting(Whole(1, 10**6), "examples of the test split", only_for=SEQUENCES)
    shared_tokenizer: bool | None = setting(
        Flag(), "one for sources and targets, learned from both; false: one for each", only_for=("translation",)
    )
    history: int | None = setting(
        Whole(1, 10**5), "past steps that a forecast is made from [steps]", only_for=FORECASTING
    )
    horizon: int | None = setting(Whole(1, 10**5), "future steps, forecast all at once [steps]", only_for=FORECASTING)
    season: int | None = setting(
        Whole(1, 10**5, optional=True), "period of the series; null: none [steps]", only_for=FORECASTING
    )
    patch: int | None = setting(Whole(1, 10**4), "steps of the history in one position [steps]", only_for=FORECASTING)


@dataclass(frozen=True)
class ModelConfig:
    d_model: int = setting(Whole(1, 10**6), "D, width of the residual stream")
    n_blocks: int = setting(Whole(1, 10**4), "L, number of blocks")
    n_heads: int = setting(Whole(1, 10**6), "H, attention heads of a block; divides d_model")
    d_ffn: int = setting(Whole(1, 10**7), "F, width of the feed-forward network's hidden layer")
    max_seq_len: int = setting(Whole(1, 10**7), "T, length of a sequence [tokens]")
    dropout: float = setting(Number(minimum=0, below=1), "probability that an element is dropped, in training")
    vocab_size: int | None = setting(Whole(1, 10**8, optional=True), "V [tokens]; null: the tokenizer's")
    learning_rate: float = setting(Number(above=0), "a good learning rate for this size with AdamW")
    n_kv_heads: int | None = setting(
        Whole(1, 10**6, optional=True),
        "G, heads of keys and values, for architecture=llama; divides n_heads; null: H",
        default=None,
    )
    n_encoder_blocks: int | None = setting(
        Whole(1, 10**4, optional=True), "blocks of the encoder, if there is one; null: n_blocks", default=None
    )
    positions: str | None = setting(
        Word(POSITIONS, optional=True),
        "position encoding: none (a control), learned, sinusoidal, or rotary (llama); null: the architecture's own",
        default=None,
    )


@dataclass(frozen=True)
class ArchitectureConfig:
    name: str = option_name(*ARCHITECTURES)
    activation: str = setting(Word(ACTIVATIONS), "of the feed-forward network: " + ", ".join(ACTIVATIONS))
    learning_rate_scale: float = setting(Number(above=0), "factor of the learning rate: post-norm needs a lower one")
    norm_epsilon: float | None = setting(
        NORM_EPSILON_RULE,
        "added under the root in every norm; null: 1e-5 in layer norm, 1e-6 in RMSNorm",
        default=None,
    )
    rotary_base: float | None = setting(
        ROTARY_BASE_RULE,
        "pair i of a head rotates by base^(-2i / K) [radians per position]; null: 10000",
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
        Text(optional=True), "one of a dataset's several configs; null: its default", only_for=(*HUB, *WITH_FORMAT)
    )
    revision: str | None = setting(
        Text(optional=True), "a commit, branch or tag on the hub; null: the newest", only_for=(*HUB, *WITH_FORMAT)
    )
    streaming: bool | None = setting(
        Flag(optional=True), "read subset_size documents from the hub without downloading all", only_for=HUB
    )
    split: str | None = setting(
        Text(optional=True), "the training split; null: train", only_for=("saved", *HUB, *WITH_FORMAT)
    )
    text_column: str | None = setting(
        Text(optional=True), "column of the texts; null: text", only_for=(*FILES, *HUB, "labelled")
    )
    label_column: str | None = setting(
        Text(optional=True), "column of the labels, texts or whole numbers; null: label", only_for=("labelled",)
    )
    augment: tuple[str, ...] | None = setting(
        Words(("swap", "delete", "insert")),
        "change a tenth of the words of training texts in each epoch: swap, delete, insert, or several; null: none",
        only_for=LABELLED,
    )
    format: str | None = setting(
        Word(tuple(dict.fromkeys((*PAIR_FORMATS, *LABELLED_FORMATS))), optional=True),
        f"file format: for pairs {', '.join(PAIR_FORMATS)} (lines: two files, PATH.SOURCE_COLUMN and "
        f"PATH.TARGET_COLUMN), for labelled {', '.join(LABELLED_FORMATS)}; null: by the file name",
        only_for=WITH_FORMAT,
    )
    source_column: str | None = setting(
        Text(optional=True), "column of the sources: a name, in tsv also a number; null: source", only_for=("pairs",)
    )
    target_column: str | None = setting(
        Text(optional=True), "column of the targets: a name, in tsv also a number; null: target", only_for=("pairs",)
    )
    languages: tuple[str, ...] | None = setting(
        Texts(), "target languages of the English dates, as CLDR names them", only_for=("dates",)
    )
    subset_size: int | None = setting(
        Whole(2, optional=True), "use only the first N training documents; null: all", default=None
    )
    validation: float | str | None = setting(
        Share(),
        "validation split: a share of the documents, or a split's name; for pairs and labelled also a file; null: the "
        "dataset's validation split, or a tenth",
        default=None,
    )
    test: str | None = setting(
        Text(optional=True),
        "test split, for evaluate --split test: a file or a folder, for saved and hub a split's name; null: test, if "
        "it exists",
        only_for=("text", *FILES, *HUB, *WITH_FORMAT),
    )
    max_length: int | None = setting(
        Whole(2, optional=True),
        "longer documents are cut [tokens]; null: never packed, padded at model.max_seq_len",
        default=None,
    )
    on_bad_row: str = setting(
        Word(("error", "skip")),
        "a row that cannot be read: error ends the run, skip leaves it out and counts it (up to 1 % of texts)",
        default="error",
    )
    time_column: str | None = setting(Text(optional=True), "column of the times; null: the first", only_for=("series",))
    value_columns: tuple[str, ...] | None = setting(
        Texts(optional=True), "columns to forecast; null: all but the time", only_for=("series",)
    )
    test_share: float | None = setting(
        Number(above=0, below=1, optional=True),
        "share of the test split: the last steps of a series, or some labelled texts of each label (null: none)",
        only_for=(*SERIES, *LABELLED),
    )


@dataclass(frozen=True)
class TokenizerConfig:
    name: str = option_name("bpe", "byte", "char", "file", "gpt2", "pretokenized", "none")
    vocab_size: int | None = setting(Whole(257, 10**6), "number of tokens of bpe, bytes included", only_for=("bpe",))
    path: str | None = setting(Text(), "a folder with tokenizer.json", only_for=("file",))
    source_path: str | None = setting(
        Text(optional=True), "for translation: folder of the sources' tokenizer; null: path", only_for=("file",)
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
        Whole(1, 4096, optional=True), "CPU threads of each process; null: the cores, shared among the processes"
    )
    processes: int = setting(
        Whole(1, 1024),
        "processes on this machine that share the batches of the training; see torchrun for several machines",
        default=1,
    )
    index: int | None = setting(Whole(0, 1023, optional=True), "which GPU, from 0; null: the first", only_for=("cuda",))
    deterministic: bool | None = setting(
        Flag(optional=True), "bitwise reproducible runs on a GPU, which take more time", only_for=("auto", "cuda")
    )


@dataclass(frozen=True)
class ImplementationConfig:
    name: str = option_name(*IMPLEMENTATIONS)
    compile: str | None = setting(
        Word(COMPILE), "torch.compile for the step: auto (on a GPU), always, never", only_for=("baseline",)
    )


@dataclass(frozen=True)
class KernelsConfig:
    name: str = option_name(*KERNELS)
    compile: str | None = setting(
        Word(COMPILE),
        "compile small functions: auto (if there is a C++ compiler; on a GPU Triton and graphs), always, never",
        only_for=("fused",),
    )


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = option_name("adamw", "sgd")
    learning_rate: float = setting(Number(above=0), "its peak, after warm-up; adamw uses model.learning_rate")
    weight_decay: float = setting(Number(minimum=0), "decay of the matrices")
    betas: tuple[float, float] | None = setting(Betas(), "decay rates of the two moments", only_for=("adamw",))
    epsilon: float | None = setting(Number(above=0), "added to the root of the second moment", only_for=("adamw",))
    momentum: float | None = setting(Number(minimum=0, below=1), "decay rate of the velocity", only_for=("sgd",))
    sharded: bool | str = setting(
        FlagOrAuto(), "each process stores the moments of its part only; auto: if possible", default="auto"
    )


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = option_name("cosine", "linear", "constant", "noam", "plateau")
    warmup_ratio: float = setting(Number(minimum=0, below=1), "share of all steps in which the learning rate rises")
    warmup_steps: int | None = setting(
        Whole(0, optional=True), "warm-up [optimizer steps]; null: warmup_ratio of all steps", default=None
    )
    min_learning_rate: float | None = setting(
        Number(minimum=0, optional=True),
        "learning rate at the end; null: a tenth of the peak",
        only_for=("cosine", "linear", "plateau"),
    )
    peak: float | None = setting(
        Number(above=0, optional=True),
        "peak learning rate; null: the paper's, (D x warm-up steps)^-0.5; optimizer.learning_rate has no effect",
        only_for=("noam",),
    )
    factor: float | None = setting(
        Number(above=0, below=1), "factor of the learning rate when nothing improves", only_for=("plateau",)
    )
    patience: int | None = setting(
        Whole(1), "evaluations without improvement before the learning rate is lowered", only_for=("plateau",)
    )


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = setting(Whole(1, 10**6), "B, sequences of one forward pass")
    gradient_accumulation_steps: int = setting(Whole(1, 10**6), "forward passes in an optimizer step")
    max_steps: int | None = setting(Whole(1, optional=True), "[optimizer steps]; this or num_epochs, the other null")
    num_epochs: float | None = setting(Number(above=0, optional=True), "passes through the training split")
    max_grad_norm: float | None = setting(Number(above=0, optional=True), "clip the gradient to this norm; null: never")
    label_smoothing: float = setting(Number(minimum=0, below=1), "share of the target spread over the vocabulary")
    eval_every: int | str = setting(Whole(word="epoch"), "[steps], or the word epoch")
    log_every: int | str = setting(Whole(word="epoch"), "[steps], or the word epoch")
    save_every: int | str = setting(Whole(word="epoch"), "[steps], or the word epoch")
    eval_batches: int | None = setting(
        Whole(1, optional=True), "batches of a periodic evaluation; null: the whole split, as at the end"
    )
    keep_checkpoints: int = setting(Whole(1, 10**6), "number of newest checkpoints to keep, in addition to the best")
    sample_prompts: tuple[str, ...] = setting(Texts(), "texts that every evaluation continues")
    sample_length: int = setting(Whole(0, 10**6), "length of each sample [tokens]")
    non_finite: str = setting(Word(("raise", "skip")), "what to do if the loss or the gradient of a step is not finite")
    non_finite_limit: int = setting(Whole(1), "skipped steps in a row that end a run")
    overfit_batches: int | None = setting(
        Whole(1, optional=True), "train on the first N batches only, repeatedly; null: on all", default=None
    )
    save_every_minutes: float | None = setting(
        Number(above=0, optional=True), "save also when this time has passed since the last save", default=None
    )
    recompute: str = setting(
        Word(RECOMPUTE),
        "activations that backward recomputes instead of storing: none, or block, all but each block's input",
        default="none",
    )
    patience: int | None = setting(
        Whole(1, optional=True),
        "evaluations in a row without improvement that end a run early; null: never",
        default=None,
    )
    inspect_every: int | None = setting(
        Whole(1, optional=True),
        "[steps] between two inspections of every layer (inspect/ metrics, pictures); null: none",
        default=None,
    )


@dataclass(frozen=True)
class TrackingConfig:
    name: str = option_name("mlflow", "none")


@dataclass(frozen=True)
class SweepConfig:
    resume: str | None = setting(
        Text(optional=True), "a sweep's directory or id, or last: run its unfinished jobs; allows no other key"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run. `validation.validate` makes it from a mapping, or reports all violations.

    A group with a default was added later: runs of older versions, whose configs lack it, behave as that default.
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
        "null: composed of the architecture, the model and the dataset",
        default=None,
    )
    seed: int = setting(Whole(0, 2**32 - 1), "seed of weights, data order, dropout and samples", default=0)
    resume: str | None = setting(
        Text(optional=True), "last, best, a run id, or the path of a run or a checkpoint", default=None
    )
    init_from: str | None = setting(
        Text(optional=True),
        "start from the weights of a run, a checkpoint or a folder from convert, which sets sizes and tokenizer",
        default=None,
    )
    tags: dict[str, str] = field(
        default_factory=dict,
        metadata={"rule": Tags(), "about": "tags of the MLflow run, as in tags.note=first", "only_for": ()},
    )
    plan: bool = setting(Flag(), "print the plan of the run and stop", default=False)
    plugins: tuple[str, ...] = setting(Texts(), "modules given with --plugin; recorded, never imported", default=())

    @property
    def network_name(self) -> str:
        """decoder, encoder or encoder_decoder."""
        return self.network or DEFAULT_NETWORK[self.task.name]

    def network_config(self, vocab_size: int, **fields: Any) -> CustomTransformerConfig:
        """The config of this run's network. `vocab_size` is the tokenizer's, used if `model.vocab_size` is null;
        `fields` are the settings that the task decides."""
        symbols = {"padding_token_id": self.task.symbols}  # in tasks with symbols, the padding id follows them
        sizes = {name: value for name, value in asdict(self.model).items() if name != "learning_rate"}
        sizes["vocab_size"] = self.model.vocab_size or vocab_size
        return CustomTransformerConfig(
            **sizes,
            **(symbols | fields),
            network=self.network_name,
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
        """The learning rate after warm-up, the highest of the run."""
        return self.optimizer.learning_rate * self.architecture.learning_rate_scale

    def to_dict(self) -> dict[str, Any]:
        """The config as plain mappings, lists, numbers and texts, as in `config.yaml`; `validate` inverts it.

        It leaves out the keys that the chosen option of their group does not have.
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
    """The folder `conf` or `experiments`: beside the package in a checkout, inside an installed package."""
    package = Path(__file__).resolve().parents[1]
    return next((folder for folder in (package / name, package.parent / name) if folder.is_dir()), package / name)


def model_sizes() -> dict[str, dict[str, int | float | None]]:
    """The sizes of each option of `conf/model`, whose files consist of lines `key: number`."""
    return {
        path.stem: {key: _number(text) for key, text in option_values("model", path.stem).items()}
        for path in sorted(shipped_folder("conf").glob("model/*.yaml"))
    }


def option_values(group: str, option: str) -> dict[str, str]:
    """The keys and values of `conf/GROUP/OPTION.yaml` as texts. It must consist of lines `key: value`; no YAML library
    is needed."""
    text = (shipped_folder("conf") / group / f"{option}.yaml").read_text(encoding="utf-8")
    pairs = (line.split("#")[0].partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def _number(text: str) -> int | float | None:
    if text == "null":
        return None
    return int(text) if text.isdecimal() else float(text)
