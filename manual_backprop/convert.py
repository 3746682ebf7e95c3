"""Export a model to `transformers`, or import one from it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manual_backprop.common.errors import InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.startup.output import enduring_output
from manual_backprop.config.arguments import Parser
from manual_backprop.config.rules import nearest
from manual_backprop.trained_models.saved_model import RUN_HELP

if TYPE_CHECKING:
    from manual_backprop.data.tokens.tokenizer import Tokenizer

DESCRIPTION = f"""\
Exports a model to `transformers`, or imports one. The weights keep their exact values.

  python -m manual_backprop.convert to-hf RUN FOLDER
  python -m manual_backprop.convert from-hf FOLDER_OR_NAME FOLDER

to-hf writes config.json, model.safetensors, the tokenizer and a model card; AutoModelForCausalLM and AutoTokenizer of
transformers can load them. architecture=gpt2 becomes GPT2LMHeadModel and architecture=llama LlamaForCausalLM;
transformers has no counterpart of architecture=vaswani. The folder can also be used as RUN.

{RUN_HELP}

from-hf reads a folder in the layout of GPT-2 or Llama, or a model of the hub by its name (OWNER/NAME), and writes a
checkpoint of step 0 with its tokenizer. Every command accepts the new folder as RUN, and `init_from=FOLDER` fine-tunes
it: sizes and tokenizer are then those of the imported model. Weights must be safetensors (in one file or several);
pickles are not opened. The norms' epsilon and the rotary base are the model's. Options that we do not implement, such
as rope_scaling, attention_bias or a tied head in Llama, are an error that names the option.

The last argument, FOLDER, is created. It must not hold files; if something fails, it is not created."""

EPILOG = """\
Examples

  python -m manual_backprop.convert to-hf last exported
  python -m manual_backprop.convert to-hf last@last exported-last
  python -m manual_backprop.convert from-hf openai-community/gpt2 gpt2
  python -m manual_backprop.generate gpt2 --prompt "The meaning of"
  python -m manual_backprop.run init_from=gpt2 dataset=text dataset.path=mine.txt model.max_seq_len=128 \\
      optimizer.learning_rate=3e-5 training.max_steps=100

Exit codes: 0 done, 2 wrong input, 4 the folder cannot be written."""

DIRECTIONS = ("to-hf", "from-hf")


def to_hf(run: str, target: Path) -> None:
    """Export the model of a run into the folder `target`, with its tokenizer if it has one."""
    from manual_backprop.models.huggingface.layouts import layout_of
    from manual_backprop.trained_models.saved_model import load

    saved = load(run, device="cpu")
    print(saved.line, flush=True)
    layout = layout_of(saved.model.config)
    from manual_backprop.data.tokens.tokenizer import FILE_NAME
    from manual_backprop.trained_models.export import export_model

    tokenizer = saved.tokenizer() if (saved.found.checkpoint / FILE_NAME).is_file() else None
    export_model(saved, tokenizer, target)
    print(f"{target}: {layout.class_name}" + (", without a tokenizer" if tokenizer is None else " and its tokenizer"))
    print(f'Load it with AutoModelForCausalLM.from_pretrained("{target}"); {target / "README.md"} is its model card.')


def from_hf(source: str, target: Path) -> None:
    """Import the model of a folder, or of a name on the hub, as a checkpoint of step 0 in the folder `target`."""
    from manual_backprop.trained_models.huggingface_directory import local_folder, read_model, weight_files

    folder = local_folder(source)
    weight_files(folder)  # raises before torch is imported
    from manual_backprop.trained_models.export import import_model

    imported = read_model(folder)
    tokenizer = _tokenizer_of(folder, imported.config.vocab_size)
    import_model(imported, tokenizer, source, target)
    config = imported.config
    count = sum(tensor.numel() for tensor in imported.parameters.values())
    print(f"{target}: {config.architecture}, {config.precision}, {count:,} parameters")
    for remark in imported.remarks:
        print(f"  {remark}")
    if tokenizer is None:
        print("  The folder has no tokenizer in a format that is known here: the model takes token ids.")
    print(f"Use it as RUN, or fine-tune it: python -m manual_backprop.run init_from={target}")


def _tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a folder; None if there is none. Raises InputError if the network has too few tokens for it."""
    from manual_backprop.data.tokens.pretrained import tokenizer_of_folder

    if not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
        return None
    tokenizer = tokenizer_of_folder(folder)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{folder} is inconsistent: its tokenizer has {tokenizer.vocab_size} tokens, its network {vocab_size}"
        )
    return tokenizer


@enduring_output()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("convert", DESCRIPTION, EPILOG)
    parser.add_argument("direction", metavar="to-hf|from-hf", help="export to transformers, or import")
    parser.add_argument("source", metavar="SOURCE", help="to-hf: RUN; from-hf: a folder, or a name on the hub")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to create")
    options = parser.parse(arguments)
    if options.direction not in DIRECTIONS:
        meant = nearest(options.direction, list(DIRECTIONS))
        parser.error(f"{options.direction}: must be to-hf or from-hf" + (f"; did you mean {meant}?" if meant else ""))
    from manual_backprop.common.durable_files import refuse_used

    refuse_used(options.folder)  # before the work
    (to_hf if options.direction == "to-hf" else from_hf)(options.source, options.folder)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
