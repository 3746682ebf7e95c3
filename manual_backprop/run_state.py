"""What a checkpoint of a run holds, and how a run is put back to where it was made.

The tensors are the parameters and everything of the optimizer. All else follows from the config and the step: which
windows come next, at which learning rate, with which dropout masks. The state says what the config cannot: what the
data was, how long metrics.jsonl was, and with how many threads sums were made.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checkpoint import Checkpoint
from .circumstances import circumstances, differing
from .config import CustomTransformerConfig
from .data.corpus import Corpus
from .errors import ConfigError
from .resume import changed_settings
from .rules import shown
from .tracking import RunDirectory

if TYPE_CHECKING:
    from .runner import Runner

log = logging.getLogger(__name__)


def tensors_of(runner: Runner) -> dict[str, dict[str, Tensor]]:
    """Where they lie, and no copies: a save ends before the next step begins."""
    return {"parameters": dict(runner.network.parameters), "optimizer": runner.optimizer.state_views()}


def state_of(runner: Runner, metrics_length: int) -> dict[str, Any]:
    """What `resume.STATE` asks for. `network` is for readers that have no config, as the wrapper."""
    return {
        "config": runner.config.to_dict(),
        "network": asdict(runner.network_config),
        "dataset_digest": runner.corpus.dataset_digest,
        "tokenizer_digest": runner.corpus.tokenizer_digest,
        "metrics_length": metrics_length,
        "made_with": circumstances(runner.network),
    }


def refuse_another_text(corpus: Corpus, network: CustomTransformerConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError with what the config does not tell: other data, another tokenizer or vocabulary."""
    saved, way_out = checkpoint.state, f"; bring back that of {checkpoint.path}, or start a new run"
    pairs = {
        f"dataset: this text, with its files' names, is another one{way_out}": (
            saved["dataset_digest"],
            corpus.dataset_digest,
        ),
        f"tokenizer: this is another one{way_out}": (saved["tokenizer_digest"], corpus.tokenizer_digest),
        f"model.vocab_size={network.vocab_size}: must stay {saved['network'].get('vocab_size')}, as in "
        f"{checkpoint.path}": (saved["network"].get("vocab_size"), network.vocab_size),
    }
    differences = [sentence for sentence, (before, now) in pairs.items() if before != now]
    if differences:
        raise ConfigError(differences)


def restore(runner: Runner, checkpoint: Checkpoint) -> None:
    """Put parameters and optimizer back. Raises InputError, and changes nothing, where they do not fit."""
    runner.network.load_parameters(checkpoint.tensors["parameters"])
    runner.optimizer.load_state(checkpoint.tensors["optimizer"])
    runner.optimizer.forget_longest()
    runner.step = checkpoint.step


def tell_changes(runner: Runner, checkpoint: Checkpoint, directory: RunDirectory) -> None:
    """A run goes on: what is not as it was, on the terminal and in run.json."""
    settings = changed_settings(runner.config, checkpoint)
    around = differing(checkpoint.state["made_with"], circumstances(runner.network))
    if settings:
        changes = (f"{key}={shown(now)} (was {shown(before)})" for key, (before, now) in settings.items())
        log.warning("From step %d on: %s.", runner.step + 1, ", ".join(changes))
    if around:
        log.warning("The last bits will differ from those of a run that was never stopped: %s.", "; ".join(around))
    changed = {key: list(pair) for key, pair in settings.items()} | ({"made_with": around} if around else {})
    directory.resume(runner.step, changed)
