"""A language model seen from outside: token ids in, logits, losses and text ids out; no `nn.Module`.

`CustomTransformerWrapper` puts `CustomTransformer` behind the interface that users of `transformers` know; what happens
inside a step is the network's business (`models/`), and long trainings are the runner's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..common.errors import CheckpointError, ConfigError, InputError, NotFiniteError
from ..config.network import network_of_state
from ..config.schema import CustomTransformerConfig
from ..ops import IGNORED
from .custom import CustomTransformer
from .decoding import IncrementalDecoder
from .implementations import build_network
from .network import Network, check_ids

MODEL_TYPE = "custom_transformer"
DEFAULT_SIZES = {"vocab_size": 50257, "d_model": 256, "n_blocks": 4, "n_heads": 4, "d_ffn": 512, "max_seq_len": 256}


class LanguageModel:
    """Any `Network`, used as a language model."""

    def __init__(self, network: Network):
        self.network = network
        self.config = network.config
        self.step = 0  # training steps so far: each has its own dropout masks

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Logits, and with labels the loss, in evaluation (no dropout).

        input_ids (B, T) of token ids. labels (B, T) as in transformers: usually input_ids themselves, shifted inside
        (the logits at t are held against the label at t + 1), -100 where they do not count; the loss is the mean over
        those that count, 0 if none does. attention_mask (B, T) is 1 for real tokens and 0 for padding, which no real
        token sees; its labels count unless they are -100, as in transformers.

        Returns {"logits": (B, T, V), "loss": one number or None}. Raises InputError for what cannot be read.
        """
        tokens, targets, segments = self._read(input_ids, labels, attention_mask)
        logits = self.network.predict(tokens, segments)
        loss = None
        if targets is not None:
            loss, _ = ops.cross_entropy_forward(logits, targets)
        return {"logits": logits, "loss": loss}

    __call__ = forward

    def train_step(
        self,
        input_ids: Tensor,
        labels: Tensor,
        learning_rate: float,
        max_grad_norm: float | None = 1.0,
        attention_mask: Tensor | None = None,
    ) -> dict[str, float | str]:
        """One step of plain gradient descent: forward, loss, loss gradient, backward, clip, update.

        Returns {"loss", "grad_norm" (before clipping), "status"}: Python numbers, so this waits for the device. The
        status is "success", or "skipped" where the loss or the norm was not finite; nothing is updated then. Raises
        InputError, and nothing is changed, for what cannot be read.
        """
        if not learning_rate >= 0 or not _is_finite(learning_rate):
            raise InputError(f"learning_rate={learning_rate}: expected a finite number of at least 0.")
        if max_grad_norm is not None and (not max_grad_norm > 0 or not _is_finite(max_grad_norm)):
            raise InputError(
                f"max_grad_norm={max_grad_norm}: expected a finite number above 0, or None for no clipping."
            )
        tokens, targets, segments = self._read(input_ids, labels, attention_mask)
        if targets is None:
            raise InputError("labels are None: a training step needs them, usually input_ids themselves.")
        network, self.step = self.network, self.step + 1
        network.zero_gradients()
        logits = network.forward(tokens, segments, step=self.step)
        loss, loss_cache = ops.cross_entropy_forward(logits, targets, label_smoothing=self.config.label_smoothing)
        dlogits = ops.cross_entropy_backward(1.0, loss_cache)
        network.backward(dlogits)
        gradients = network.gradient_tensors()
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        loss_value = loss.item()
        if not all(map(_is_finite, (norm, loss_value))):
            return {"loss": loss_value, "grad_norm": norm, "status": "skipped"}
        if max_grad_norm is not None and norm > max_grad_norm:
            torch._foreach_mul_(gradients, max_grad_norm / norm)
        network.update_parameters(learning_rate)
        return {"loss": loss_value, "grad_norm": norm, "status": "success"}

    def generate(
        self,
        input_ids: Tensor,
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The prompt and its continuation, (B, T + at most max_length).

        input_ids (B, T) with T >= 1. max_length counts new tokens. temperature 0 takes the likeliest token each time,
        the first of equal ones; otherwise one is drawn, among the top_k likeliest (None or 0: all), of these among the
        smallest set whose probabilities reach top_p (None: all). A row that has drawn eos_token_id stays there, and
        when all have, this returns. The same seed draws the same tokens. Past max_seq_len the oldest tokens fall out
        of sight, half a window at a time (models/decoding.py).
        """
        tokens = [input_ids]
        tokens += self.stream(input_ids, max_length, temperature, top_k, top_p, eos_token_id, seed)
        return torch.cat(tokens, dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """`generate`, token by token: yields (B, 1) as soon as it is drawn. What cannot be used is refused at once."""
        _check_sampling(max_length, temperature, top_k, top_p, seed)
        _check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise InputError(
                f"input_ids have shape {tuple(input_ids.shape)}; expected (batch, sequence) with at least one token: "
                "continue from the end token where there is no prompt."
            )
        self.network.check_tokens(input_ids[:, -self.config.max_seq_len :])
        check_ids("token id", input_ids, self.config.vocab_size)
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return self._draw(input_ids, max_length, temperature, top_k, top_p, eos_token_id, generator)

    def _draw(
        self,
        input_ids: Tensor,
        max_length: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        eos_token_id: int | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        decoder = IncrementalDecoder(self.network, len(input_ids))
        unread = input_ids[:, -self.config.max_seq_len :]
        finished = torch.zeros(len(input_ids), 1, dtype=torch.bool)
        for _ in range(max_length):
            logits = decoder.read(unread.to(self.network.device))  # (B, V)
            drawn = sample(logits.double().cpu(), temperature, top_k, top_p, generator)  # (B, 1)
            if eos_token_id is not None:
                drawn = torch.where(finished, eos_token_id, drawn)
                finished |= drawn == eos_token_id
            yield drawn.to(input_ids.device)
            if eos_token_id is not None and bool(finished.all()):
                return
            unread = drawn

    def count_parameters(self) -> int:
        return self.network.count_parameters()

    def get_model_info(self) -> dict[str, Any]:
        """What this is: model_type, implementation, architecture, precision, sizes and the number of parameters."""
        config = self.config
        sizes = ("vocab_size", "d_model", "n_blocks", "n_heads", "d_ffn", "max_seq_len")
        return {
            "model_type": MODEL_TYPE,
            "implementation": type(self.network).__name__,
            "architecture": config.architecture,
            "precision": config.precision,
            **{name: getattr(config, name) for name in sizes},
            "parameters": self.count_parameters(),
        }

    def save_checkpoint(self, directory: str | Path) -> Path:
        """Writes `directory/step-NNNNNN/` (safetensors, JSON, checksums) and returns its path. Others stay.

        Raises StorageError.
        """
        from ..checkpoints.checkpoint import CheckpointManager

        state = {"network": asdict(self.config), "training_steps": self.step}
        return CheckpointManager(directory, keep=None).save(self.step, {"parameters": self.network.parameters}, state)

    def load_checkpoint(self, path: str | Path) -> None:
        """Replaces the parameters by those of a checkpoint, or of the newest one in a directory of checkpoints.

        Raises CheckpointError, and nothing is changed, if it is damaged or belongs to another network.
        """
        checkpoint = _load(path)
        saved = saved_network(checkpoint)
        _check_same_network(checkpoint.path, saved, self.config)
        self.network.load_parameters(checkpoint.tensors["parameters"])
        self.step = checkpoint.step

    def _read(
        self, input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Checked, shifted, moved to the device: tokens, targets, segments, (B, T) each."""
        for name, tensor in (("input_ids", input_ids), ("labels", labels), ("attention_mask", attention_mask)):
            _check_tensor(name, tensor)
        for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}; expected that of input_ids, {tuple(input_ids.shape)}."
                )
        self.network.check_tokens(input_ids)
        check_ids("token id", input_ids, self.config.vocab_size)  # check_tokens leaves this out on a GPU
        targets = segments = None
        if labels is not None:
            if labels.dtype not in (torch.int64, torch.int32):
                raise InputError(f"labels are {labels.dtype}; expected whole numbers, torch.int64 or torch.int32.")
            check_ids("label", labels, self.config.vocab_size, ignored=True)
            targets = torch.full_like(labels, IGNORED)
            targets[:, :-1] = labels[:, 1:]
            targets = targets.to(self.network.device)
        if attention_mask is not None and not bool(attention_mask.all()):
            segments = (attention_mask != 0).long().to(self.network.device)
        return input_ids.to(self.network.device), targets, segments


class CustomTransformerWrapper(LanguageModel):
    """The hand-written transformer as a language model.

        model = CustomTransformerWrapper(vocab_size=256, d_model=64, n_blocks=2, n_heads=4, d_ffn=256, max_seq_len=64)
        model.train_step(input_ids, labels=input_ids, learning_rate=0.1)
        model.generate(input_ids[:, :8], max_length=20, temperature=0.8)

    Takes keywords, the sizes and any other field of CustomTransformerConfig (architecture, precision, dropout, device,
    seed ...), or a CustomTransformerConfig. Raises ConfigError with everything that is wrong.
    """

    def __init__(
        self,
        config: CustomTransformerConfig | None = None,
        *,
        vocab_size: int | None = None,
        d_model: int | None = None,
        n_blocks: int | None = None,
        n_heads: int | None = None,
        d_ffn: int | None = None,
        max_seq_len: int | None = None,
        **others: Any,
    ):
        """Sizes that are not given: 50257, 256, 4, 4, 512, 256."""
        sizes: dict[str, Any] = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_blocks": n_blocks,
            "n_heads": n_heads,
            "d_ffn": d_ffn,
            "max_seq_len": max_seq_len,
        }
        given = {name: value for name, value in sizes.items() if value is not None}
        if config is None:
            try:
                config = CustomTransformerConfig(**(DEFAULT_SIZES | given), **others)
            except TypeError as error:
                known = ", ".join(CustomTransformerConfig.__dataclass_fields__)
                raise ConfigError([f"{str(error).split(') ')[-1]}; a model takes: {known}"]) from error
        else:
            if not isinstance(config, CustomTransformerConfig):
                raise ConfigError(
                    [f"{config!r}: expected a CustomTransformerConfig; sizes are keywords, as in vocab_size=257"]
                )
            ignored = [*others, *given]
            if ignored:
                raise ConfigError(
                    [f"{', '.join(ignored)}: given beside a config; change the config (dataclasses.replace) instead"]
                )
        super().__init__(CustomTransformer(config))

    @classmethod
    def from_checkpoint(cls, path: str | Path, **changes: Any) -> CustomTransformerWrapper:
        """The model of a checkpoint (or of the newest one in a directory). `changes` replace fields of its config that
        the parameters do not depend on, `device="cpu"` for example. Raises CheckpointError."""
        checkpoint = _load(path)
        saved = saved_network(checkpoint)
        model = cls(**(asdict(saved) | {"device": "auto"} | changes))
        _check_same_network(checkpoint.path, saved, model.config)
        model.network.load_parameters(checkpoint.tensors["parameters"])
        model.step = checkpoint.step
        return model


def build_model(implementation: str, config: CustomTransformerConfig) -> LanguageModel:
    """The network of `implementation=NAME` as a language model. Raises ConfigError for one that cannot be built."""
    if implementation == "custom":
        return CustomTransformerWrapper(config)
    return LanguageModel(build_network(implementation, config))


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """logits (B, V) -> one token id for each row, (B, 1). Raises NotFiniteError: from NaN nothing can be drawn."""
    if not bool(logits.isfinite().all()):
        raise NotFiniteError("The logits are not finite: the parameters have diverged, and no token can be drawn.")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0: nothing overflows
    if top_k:
        likeliest = logits.topk(min(top_k, logits.shape[-1]))  # of equal ones, as many as there is room for
        logits = torch.full_like(logits, float("-inf")).scatter(-1, likeliest.indices, likeliest.values)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, places = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # what likelier tokens have already: the first is always kept
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)


def _check_same_network(path: Path, saved: CustomTransformerConfig, here: CustomTransformerConfig) -> None:
    """CheckpointError unless both agree on what the parameters mean; the rest is a model's own choice."""
    there, own = (
        asdict(one)
        | {"activation": one.activation or one.traits.activation, "n_kv_heads": one.kv_heads}
        | {"norm_epsilon": one.epsilon, "rotary_base": one.base}
        for one in (saved, here)
    )
    names = ("architecture", "activation", *DEFAULT_SIZES, "n_kv_heads", "norm_epsilon", "rotary_base")
    differences = [f"{name} is {there[name]} there and {own[name]} here" for name in names if own[name] != there[name]]
    if differences:
        raise CheckpointError(f"{path} belongs to another network: {'; '.join(differences)}.")


def _check_tensor(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise InputError(
            f"{name} is a {type(value).__name__}; expected a tensor: torch.tensor([...]), (batch, sequence)."
        )


def _check_sampling(
    max_length: int, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    for name, value in (("max_length", max_length), ("top_k", top_k), ("seed", seed)):
        if value is not None and (not isinstance(value, int) or not -(2**63) <= value < 2**63):
            raise InputError(f"{name}={value!r}: expected a whole number of at most 63 bits.")
    if max_length < 0:
        raise InputError(f"max_length={max_length}: it counts new tokens; expected at least 0.")
    if not temperature >= 0 or not _is_finite(temperature):
        raise InputError(f"temperature={temperature}: expected 0 (the likeliest token) or more, usually 0.5 to 1.2.")
    if top_k is not None and top_k < 0:
        raise InputError(f"top_k={top_k}: expected how many tokens to draw from, or 0 for all.")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: expected a share of probability, more than 0 and at most 1.")


def _is_finite(value: float) -> bool:
    return value - value == 0


def _load(path: str | Path) -> Any:
    from ..checkpoints.checkpoint import CheckpointManager

    path = Path(path)
    if (path / "manifest.json").is_file() or path.name.startswith("step-"):
        return CheckpointManager(path.parent).load(path)
    return CheckpointManager(path / "checkpoints" if (path / "checkpoints").is_dir() else path).load()


def saved_network(checkpoint: Any) -> CustomTransformerConfig:
    """The config of the network whose parameters a checkpoint holds. Raises CheckpointError."""
    if "parameters" not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path} holds no network: it has no parameters.")
    return network_of_state(checkpoint.state, checkpoint.path)
