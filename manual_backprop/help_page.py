"""The page that `python -m manual_backprop.run --help` prints, made of `conf/`, `experiments/` and the rules."""

from __future__ import annotations

from pathlib import Path

from manual_backprop.config import shipped_folder
from manual_backprop.rules import shown
from manual_backprop.validation import groups, keys

MOST_USED = (
    "model.d_model",
    "model.n_blocks",
    "model.n_heads",
    "model.max_seq_len",
    "model.dropout",
    "tokenizer.vocab_size",
    "dataset.path",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "schedule.warmup_ratio",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.max_steps",
    "training.num_epochs",
    "training.max_grad_norm",
    "training.eval_every",
    "training.save_every",
    "training.sample_prompts",
    "device.threads",
    "experiment_name",
    "run_name",
    "seed",
    "resume",
    "tags",
)

EXAMPLES = (
    ("the defaults: a small model on Python's own documentation", ""),
    ("something that ends at once", "model=tiny training=smoke"),
    ("your own text, character by character", "dataset=text dataset.path=FILE tokenizer=char"),
    ("one job for each pair of values: a sweep", "-m architecture=gpt2,vaswani optimizer.learning_rate=1e-3,3e-3"),
    ("go on where the last run stopped", "resume=last"),
)


def first_comment(path: Path) -> str:
    """What a file of `conf/` or `experiments/` is, in its own words."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line[2:].strip()
    return ""


def help_page() -> str:
    from manual_backprop.composition import EXPERIMENTS, composer
    from manual_backprop.run import COMMAND

    with composer() as hydra:
        from omegaconf import OmegaConf

        composed = hydra.compose([])
        chosen = composed.hydra.runtime.choices
        lines = [f"{COMMAND} [KEY=VALUE ...]", "", "Trains a transformer whose backward pass is written by hand.", ""]
        lines += ["Choices, as in model=tiny (* unless you say otherwise)", ""]
        for group in (*groups(), EXPERIMENTS):
            folder = shipped_folder(EXPERIMENTS) if group == EXPERIMENTS else shipped_folder("conf") / group
            for number, option in enumerate(hydra.options(group)):
                path = folder / f"{option}.yaml"
                about = first_comment(path) if path.exists() else "from the folder given with --config-dir"
                head = group if number == 0 else ""
                lines.append(f"  {head:<15}{'*' if chosen[group] == option else ' '} {option:<18} {about}")
        lines += ["", "Keys used most, as in training.max_steps=500, with the value that they have", ""]
        for key in MOST_USED:
            value = OmegaConf.select(composed, key)
            lines.append(f"  {key:<37} {shown(value):<20} {keys()[key].metadata['about']}")
        lines.append("  every other key: --cfg job")
        lines += ["", "Examples", ""]
        for about, arguments in EXAMPLES:
            lines += [f"  # {about}", f"  {COMMAND} {arguments}".rstrip(), ""]
    lines += [
        "Options",
        "",
        "  -m, --multirun    one job for each combination of the values that are given as a,b or range(1,4)",
        "  --cfg job         show the composed configuration, run nothing (--resolve: with every ${...} filled in)",
        "  --config-dir DIR  a folder of your own whose experiments/NAME.yaml can be chosen",
        "  --info defaults   how Hydra composes it; also searchpath, plugins, config, all",
        "  --version, --help",
        "",
        "Nothing starts before the whole command line is right. Exit codes: 0 done, 1 a job failed, 2 a wrong",
        "configuration or input, 3 not finite, 4 storage, 130 and 143 interrupted.",
    ]
    return "\n".join(lines)
