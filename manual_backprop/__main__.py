"""`python -m manual_backprop` lists the commands of the package, in groups, each with an example."""

import sys
from pathlib import Path

# A command is a module with a `main`: what it does, and an example, which README.md or a page of docs/ has as well.
GROUPS = {
    "Train": {
        "run": ("train a model, or a sweep of them", "model=small"),
        "rerun": ("make a run again, and compare its losses bit by bit", "last"),
        "sync": ("bring to MLflow what runs could not send", "last"),
        "diagnose": (
            "find out why a loss does not fall, and which learning rate suits",
            "model=tiny dataset=text dataset.path=FILE tokenizer=char",
        ),
    },
    "Use a trained model": {
        "evaluate": ("measure a trained model, beside models that only count", "last --generate --tokens 20"),
        "predict": (
            "let a trained model label texts, or forecast, as JSON lines",
            'last --text "Run the event loop until it is stopped."',
        ),
        "generate": ("let a trained model continue a text", 'last --prompt "Return the" --temperature 0.8 --stop "."'),
        "chat": ("write a text that a trained model continues", "last"),
        "convert": ("bring a model to transformers, or one from there", "to-hf last exported"),
        "summary": ("show what a model is made of, and what it costs", "last --shapes"),
    },
    "Compare runs": {
        "compare": ("set runs side by side: what sets them apart, and how far their curves part", "last"),
        "visualize": ("overlay runs in the browser: curves, equal compute, tables, samples, attention", ""),
    },
    "Look into backpropagation": {
        "verify": ("compare every hand-written gradient with autograd's", ""),
        "explain": ("write one step of backpropagation down, number by number", ""),
        "bench": ("time the implementations against one another, in pairs", "--case C1"),
    },
    "Prepare data": {
        "tools.download_dataset": ("fetch a dataset of the hub, or list what there is", "--list"),
        "tools.inspect": ("show splits, columns, sizes and rows of a dataset", "FOLDER --rows 2"),
        "tools.tokenization": (
            "learn a tokenizer, advise on its size, prepare tokens",
            "train registry python_docs 1024",
        ),
    },
    "Measure, and write pages": {
        "tools.cost": ("measure what logging, inspection, data and several processes cost", "tracking"),
        "tools.kernel_gains": ("measure what each optimization of the kernels brings", "--case C1 C2 --rounds 3"),
        "tools.levels": ("measure the three levels of one network side by side", ""),
        "tools.api_page": ("write docs/api.md from the docstrings", ""),
        "tools.side_by_side": ("write the hand-written network beside its mirror, line by line", ""),
    },
}
COMMANDS = {name: about for group in GROUPS.values() for name, (about, _) in group.items() if "." not in name}


def page() -> str:
    """The list of those that are there: a part of the package runs where only torch is installed."""
    folder = Path(__file__).parent
    lines = ["A laboratory for backpropagation: a transformer whose backward pass is written by hand."]
    for title, group in GROUPS.items():
        there = {name: one for name, one in group.items() if (folder / f"{name.replace('.', '/')}.py").is_file()}
        lines += ["", title] if there else []
        for name, (about, example) in there.items():
            lines += [f"  {name:<23} {about}", f"{'':<26}{example_of(name, example)}"]
    return "\n".join([*lines, "", "Each takes --help. This one takes --version."])


def example_of(name: str, arguments: str) -> str:
    """The command as a user types it."""
    return f"python -m manual_backprop.{name} {arguments}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["--version"], ["-V"]):
        from manual_backprop import __version__

        print(f"manual_backprop {__version__}")
        return 0
    if given and given not in (["--help"], ["-h"]):
        from manual_backprop.common.errors import EXIT_BAD_INPUT
        from manual_backprop.config.rules import nearest

        names = [name for group in GROUPS.values() for name in group]
        meant = given[0] if given[0] in names else nearest(given[0], names)
        way_out = f"; did you mean python -m manual_backprop.{meant}?" if meant else ""
        print(f"{given[0]}: there is no such option{way_out}\n", page(), sep="\n", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(page())
    return 0


def run() -> int:
    """The console script `manual-backprop`: the same command as `python -m manual_backprop.run`."""
    from manual_backprop.common.interruption import exit_on_signal

    exit_on_signal()  # during the imports
    if sys.argv[1:2] == ["-sc"] and sys.argv[2:3] != [] and sys.argv[2].startswith("query="):
        from manual_backprop.config.completion import answer

        return answer()
    from manual_backprop.common.exit_codes import exit_code_of
    from manual_backprop.run import main as train

    return exit_code_of(train)


if __name__ == "__main__":
    sys.exit(main())
