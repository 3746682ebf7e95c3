"""The page that `python -m manual_backprop.run --help` prints, built from `conf/`, `experiments/` and the schema."""

from pathlib import Path
from textwrap import wrap

from manual_backprop.config.rules import shown
from manual_backprop.config.schema import EXPERIMENTS, shipped_folder
from manual_backprop.config.validation import groups, keys

MOST_USED = """
    model.d_model model.n_blocks model.n_heads model.max_seq_len model.dropout
    tokenizer.vocab_size dataset.path optimizer.learning_rate optimizer.weight_decay schedule.warmup_ratio
    training.batch_size training.gradient_accumulation_steps training.max_steps training.num_epochs
    training.max_grad_norm training.eval_every training.save_every training.sample_prompts
    device.threads experiment_name run_name seed resume init_from tags plan
"""

WIDTH = 118  # columns
BASIC = {  # Hydra's own options `basic`, which have no file in conf/
    "hydra/launcher": "one job after the other",
    "hydra/sweeper": "every combination of the given values",
}

EXAMPLES = (
    ("the defaults: a small model on Python's own documentation", ""),
    ("its plan: steps, memory, time, and where each value comes from; nothing runs", "plan=true"),
    ("your own text, character by character", "dataset=text dataset.path=FILE tokenizer=char"),
    ("one job for each pair of values: a sweep", "-m architecture=gpt2,vaswani optimizer.learning_rate=1e-3,3e-3"),
    ("resume the last run", "resume=last"),
    ("fine-tune another model: FOLDER is a run directory, or one that convert has written", "init_from=FOLDER"),
)


def first_comment(path: Path) -> str:
    """The first comment of a file of `conf/` or `experiments/`, which describes it; "" if it has none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line[2:].strip()
    return ""


def _choices(group: str, options: list[str], chosen: str, folder: Path) -> list[str]:
    """The options of a group, one on each line."""
    lines: list[str] = []
    width = max(18, *map(len, options))
    for option in options:
        path = folder / f"{option}.yaml"
        about = first_comment(path) if path.exists() else BASIC.get(group, "from the folder given with --config-dir")
        head = group if not lines else ""  # on the first line only
        lines += _wrapped(f"  {head:<15}{'*' if chosen == option else ' '} {option:<{width}} ", about)
    return lines


def _wrapped(head: str, about: str) -> list[str]:
    """`head` and then `about`, wrapped to WIDTH and indented below its beginning."""
    first, *more = wrap(about, WIDTH - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    indent = " " * len(head)
    return [head + first, *(indent + line for line in more)]


def help_page(command: str) -> str:
    """The text of the help page; `command` is what the user types before the overrides."""
    from manual_backprop.config.composition import composer

    with composer() as hydra:
        from omegaconf import ListConfig, OmegaConf

        composed = hydra.compose([])
        chosen = composed.hydra.runtime.choices
        lines = [f"{command} [KEY=VALUE ...]", "", "Trains a transformer whose backward pass is written by hand.", ""]
        lines += ["Choices, as in model=tiny (* marks the default)", ""]
        for group in (*groups(), EXPERIMENTS):
            folder = shipped_folder(EXPERIMENTS) if group == EXPERIMENTS else shipped_folder("conf") / group
            lines += _choices(group, hydra.options(group), chosen[group], folder)
        lines += ["", "How the jobs of a sweep (-m) are launched, and how their values are chosen", ""]
        for group in ("hydra/launcher", "hydra/sweeper"):
            folder = shipped_folder("conf") / group
            options = ["basic", *sorted(path.stem for path in folder.glob("*.yaml"))]
            lines += _choices(group, options, "basic", folder)
        lines += ["", "Most used keys, as in training.max_steps=500, with their default values", ""]
        for key in MOST_USED.split():
            value = OmegaConf.select(composed, key)
            text = shown(list(value) if isinstance(value, ListConfig) else value)
            lines += _wrapped(f"  {key:<37} {text:<20} ", keys()[key].metadata["about"])
        lines.append("  all other keys: --cfg job")
        lines += ["", "Examples", ""]
        for about, arguments in EXAMPLES:
            lines += [f"  # {about}", f"  {command} {arguments}".rstrip(), ""]
    lines += [
        "Options",
        "",
        "  -m, --multirun    one job for each combination of the values given as a,b or range(1,4)",
        "  --cfg job         show the composed configuration and run nothing (--resolve: with every ${...} filled in)",
        "  --config-dir DIR  a folder of your own whose experiments/NAME.yaml can be chosen",
        "  --plugin MODULE   a module, or a file, with tasks, objectives or activations of your own",
        "  --info defaults   how Hydra composes the configuration; also searchpath, plugins, config, all",
        "  --version, --help",
        "",
        "The whole command line is checked before anything starts. Exit codes: 0 done, 1 a job failed, 2 a wrong",
        "configuration or input, 3 not finite, 4 storage, 130 and 143 interrupted (138, 140: by SIGUSR1, SIGUSR2).",
    ]
    return "\n".join(lines)
