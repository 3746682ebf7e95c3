"""Settings of other programs that are not just another name for a key: flags that are values here, settings of another
command, settings without a counterpart.

Other names for a key (`n_layer` for `model.n_blocks`) are in `rules.py`, SYNONYMS and GROUP_SYNONYMS. The tables of
docs/guide/coming_from.md show all of them, and tests/config/test_coming_from.py compares.
"""

from manual_backprop.config.rules import by_their_name

# What to type here, and NAME=VALUE in small letters, or NAME if the value does not matter, in other programs.
_INSTEAD = {
    "architecture=gpt2": "norm_first=true tie_word_embeddings=true",
    "architecture=llama": "bias=false qkv_bias=false",
    "architecture=vaswani": "norm_first=false",
    "device.processes=2": "trainer=ddp",
    "device=cpu": "trainer=cpu",
    "device=cuda": "trainer=gpu",
    "experiments=overfit_one_batch": "debug=overfit",
    "hydra/sweeper=search": "hparams_search",
    "implementation=baseline implementation.compile=always": "compile=true torch_compile=true",
    "kernels.compile=never": "compile=false",
    "precision=bf16_mixed": "bf16=true dtype=bfloat16 mixed_precision=bf16",
    "precision=fp16_mixed": "fp16=true",
    "precision=tf32": "tf32=true",
    "python -m manual_backprop.evaluate last": "eval_only=true",
    "python -m manual_backprop.generate last --prompt TEXT": "start",
    "resume=last": "init_from=resume preload=latest resume_from_checkpoint=true",
    "schedule=constant": "decay_lr=false",
    "tracking=mlflow": "report_to=tensorboard report_to=wandb wandb_log=true",
    "tracking=none": "wandb_log=false",
    "training.eval_every=epoch": "check_val_every_n_epoch",
    "training.patience": "early_stopping.patience",
    "training.recompute=block": "gradient_checkpointing=true",
    "training=smoke": "debug=default debug=fdr debug=limit fast_dev_run=true",
}
INSTEAD = by_their_name(_INSTEAD)

_IN_PROCESS = "batches are prepared in the run's own process, from memory-mapped files of tokens"
_BY_DEVICE = "processes exchange gradients by NCCL on GPUs and by gloo on CPUs"
_CONVERTED = "convert from-hf writes a folder that init_from reads"
# NAME=VALUE or NAME, likewise: why there is nothing to type.
NOT_NEEDED = {
    "always_save_checkpoint": "the newest checkpoints and the best one are always kept",
    "backend=gloo": _BY_DEVICE,
    "backend=nccl": _BY_DEVICE,
    "dataloader_num_workers": _IN_PROCESS,
    "ddp_backend": _BY_DEVICE,
    **dict.fromkeys((f"init_from={name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")), _CONVERTED),
    "init_from=scratch": "a run starts from new weights if init_from is left out",
    "load_best_model_at_end": "the best checkpoint is always kept, and evaluate, generate and chat read it",
    "metric_for_best_model": "the task says which metric chooses the best checkpoint",
    "num_nodes": "torchrun starts the processes of several machines",
    "num_workers": _IN_PROCESS,
    "pin_memory": _IN_PROCESS,
    "push_to_hub": "convert to-hf writes a folder for hf upload",
    "strategy": "device.processes, or torchrun, says how many processes share a training",
}


def known_elsewhere(name: str, value: str | None) -> str | None:
    """The end of a sentence about an unknown setting: what to type instead, or why there is nothing to type.

    None if the setting is not one of these. `value` is None for a flag without a value.
    """
    plain = name.lower().replace("-", "_")
    text = "true" if value is None else value.lower()
    parts = plain.split(".")
    for first in range(len(parts)):  # a.b.c, then b.c, then c
        last = ".".join(parts[first:])
        for setting in (f"{last}={text}", last):
            if setting in INSTEAD and (first == 0 or not INSTEAD[setting].startswith("python -m")):
                return f"; did you mean {INSTEAD[setting]}?"
            if setting in NOT_NEEDED:
                return f"; {NOT_NEEDED[setting]}"
    return None
