"""The model card of an exported model (README.md): its sizes, training data, metrics, and gradient check."""

import json
from pathlib import Path

from ..data.tokens.tokenizer import Tokenizer
from ..study.gradient_check.run_check import GRADIENT_CHECK
from ..tracking import load_training_log
from .saved_model import SavedModel

NOT_KNOWN = "not known: the weights are not from a run"


def model_card(saved: SavedModel, tokenizer: Tokenizer | None, name: str) -> str:
    config = saved.model.config
    sizes = {
        "architecture": config.architecture,
        "parameters": f"{saved.model.count_parameters():,}",
        "vocabulary": f"{config.vocab_size:,}",
        "width": config.d_model,
        "blocks": config.n_blocks,
        "heads": config.n_heads
        if config.kv_heads == config.n_heads
        else f"{config.n_heads}, {config.kv_heads} of keys",
        "feed-forward width": config.d_ffn,
        "longest sequence": config.max_seq_len,
        "weights": config.precision,
        "optimizer steps": f"{saved.step:,}",
    }
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- manual_backprop\n---",
        f"# {name}",
        f"A {config.architecture} language model that manual_backprop trained with implementation="
        f"{saved.implementation}" + (", by gradients written by hand." if saved.implementation == "custom" else "."),
        _usage(tokenizer, config.architecture, config.precision),
        "## Sizes\n\n" + _table(sizes),
        "## Text\n\n" + _text(saved, tokenizer),
        "## Metrics\n\n" + _metrics(saved),
        "## Gradient check\n\n" + _gradient_check(saved),
        "## Config of the run\n\n" + _config(saved),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(tokenizer: Tokenizer | None, architecture: str, precision: str) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("FOLDER")']
    if tokenizer is not None:
        lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")']
        lines += ['ids = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=50)']
        lines += ["print(tokenizer.decode(ids[0]))"]
    code = "```python\n" + "\n".join(lines) + "\n```"
    remarks = []
    if tokenizer is None:
        remarks.append("There is no tokenizer: the model reads token ids.")
    elif tokenizer.end_token_id is None:
        remarks.append("The tokenizer has no end token, and it refuses characters that it does not know.")
    else:
        remarks.append(
            "A text that spells the end token becomes that token here; in manual_backprop it is ordinary text."
        )
    if architecture == "llama" and precision == "fp64":
        remarks.append(
            "LlamaRMSNorm rounds to float32 even in a float64 model, so that its logits have about seven digits; "
            "`manual_backprop.models.huggingface.weights.use_exact_norms(model)` replaces it with torch.nn.RMSNorm."
        )
    return "\n\n".join([code, *remarks])


def _text(saved: SavedModel, tokenizer: Tokenizer | None) -> str:
    state = saved.state
    dataset = state.get("config", {}).get("dataset", {})
    rows = {
        "dataset": dataset.get("repository") or dataset.get("name") or NOT_KNOWN,
        "digest of the tokens": state.get("dataset_digest", "not known"),
        "tokenizer": "none" if tokenizer is None else f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens",
        "digest of the tokenizer": state.get("tokenizer_digest", "not known"),
    }
    return _table(rows)


def _metrics(saved: SavedModel) -> str:
    """The run's validation metrics at the checkpoint's step."""
    values: dict[str, object] = {}
    if saved.found.run is not None:
        for name, series in sorted(load_training_log(saved.found.run).validation.items()):
            at = dict(zip(series.steps, series.values, strict=True)).get(saved.step)
            if at is not None:
                values[name] = f"{at:.6g}"
    if not values and saved.metric is not None:
        values["validation/loss"] = f"{saved.metric:.6g}"
    return _table(values) if values else "Nothing was measured at this step."


def _gradient_check(saved: SavedModel) -> str:
    """The gradient check that the run saved, or a new one, which takes seconds."""
    page = saved.found.run / GRADIENT_CHECK if saved.found.run is not None else None
    if page is not None and page.is_file():
        content = page.read_text(encoding="utf-8")
    elif "config" in saved.state:
        from ..study.gradient_check.run_check import check_of_run

        content = check_of_run(saved.config(), saved.model.config).page
    else:
        return "The weights are not from a run, so there are no gradients to check."
    return "```text\n" + content.strip() + "\n```"


def _config(saved: SavedModel) -> str:
    config = dict(saved.state.get("config", {}))
    if not config:
        return f"It is {NOT_KNOWN}."
    for group in ("dataset", "tokenizer"):  # a local path means nothing elsewhere
        if isinstance(config.get(group), dict) and config[group].get("path"):
            config[group] = config[group] | {"path": Path(config[group]["path"]).name}
    kept = {key: value for key, value in config.items() if key not in ("resume", "plan", "sweep", "tracking")}
    return "```json\n" + json.dumps(kept, indent=1) + "\n```"


def _table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
