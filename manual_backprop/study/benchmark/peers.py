"""The peer from `transformers`: its network for an architecture, trained with SDPA, fused AdamW and clip_grad_norm_.

It gets our weights and has no dropout; weight decay applies to matrices only. Nothing is downloaded.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ...common.batch import Batch, PairBatch
from ...config.schema import CustomTransformerConfig
from ...models.huggingface.layouts import LAYOUTS, config_json, layout_of
from ...models.huggingface.weights import to_ours, to_theirs
from ...models.implementations import build_network


def why_not(config: CustomTransformerConfig) -> str | None:
    """Why this network has no such peer on this machine; None if it has one."""
    if config.network != "decoder":
        return f"transformers has no network={config.network} with the same blocks"
    if config.architecture not in LAYOUTS:
        return f"transformers has no network of architecture={config.architecture}"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if config.precision == "fp64":
        return "transformers calculates every loss in float32"
    return None


def network_class(config: CustomTransformerConfig) -> Any:
    import transformers

    return getattr(transformers, layout_of(config).class_name)


class HuggingFacePeer:
    """A network of `transformers` with its optimizer, and the methods that a row of the benchmark calls."""

    def __init__(self, config: CustomTransformerConfig, learning_rate: float, settings: dict[str, Any]):
        """`settings` are keywords of AdamW; `weight_decay` applies to matrices."""
        self.config, self.device = config, config.get_device()
        kind = network_class(config)
        described = config_json(config, end_token_id=None)
        theirs = kind.config_class(**{name: value for name, value in described.items() if name != "architectures"})
        theirs._attn_implementation = "sdpa"
        self.model = kind(theirs).to(self.device, config.get_dtype()).train()
        self.model.loss_type = "ForCausalLM"  # otherwise transformers guesses it, with a warning
        self._load_weights()
        decayed = [parameter for parameter in self.model.parameters() if parameter.dim() >= 2]
        rest = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True, **settings)
        self.loss = self._loss

    @torch.no_grad()
    def _load_weights(self) -> None:
        theirs = dict(self.model.named_parameters())
        for name, weight in to_theirs(build_network("torch", self.config).parameters, self.config).items():
            theirs[name].copy_(weight)

    def compile(self, mode: str | None = None) -> None:
        self.loss = torch.compile(self._loss, mode=mode)

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss. The targets are shifted already; there is no key-value cache."""
        return self.model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    @torch.enable_grad()
    def loss_and_gradients(self, batch: Batch | PairBatch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        dtype = self.config.get_compute_dtype()
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != self.config.get_dtype()):
            loss = self.loss(batch.tokens, batch.targets)
        loss.backward()
        return loss.detach()

    def update(self, max_grad_norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()

    def step(self, batch: Batch | PairBatch, max_grad_norm: float) -> None:
        self.loss_and_gradients(batch)
        self.update(max_grad_norm)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients under our names."""
        theirs = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return to_ours(theirs, self.config, type(self.model).__name__)
