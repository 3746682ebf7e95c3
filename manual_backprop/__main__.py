"""`python -m manual_backprop` lists the commands of the package; each is a module with a `main`."""

import sys
from pathlib import Path

COMMANDS = {
    "run": "train a model, or a sweep of them",
    "evaluate": "measure a trained model on a split, beside baselines",
    "predict": "classify texts or forecast with a trained model, as JSON lines",
    "generate": "continue a text with a trained model",
    "chat": "type texts that a trained model continues",
    "convert": "export a model to transformers, or import one",
    "summary": "show a model's tensors, and what it costs",
    "diagnose": "find out why a loss does not fall, and which learning rate fits",
    "verify": "compare every hand-written gradient with autograd's",
    "explain": "write a page on one step of backpropagation, number by number",
    "bench": "time the implementations against each other, in pairs",
    "rerun": "repeat a run, and compare its losses bit by bit",
    "compare": "compare runs: differing settings, results, distances of curves",
    "visualize": "overlay runs in the browser: curves, equal compute, tables, samples, attention",
    "sync": "deliver to MLflow what runs could not send",
}


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["--version"], ["-V"]):
        from manual_backprop import __version__

        print(f"manual_backprop {__version__}")
        return 0
    folder = Path(__file__).parent
    there = {name: about for name, about in COMMANDS.items() if (folder / f"{name}.py").is_file()}
    listed = [
        "A laboratory for backpropagation: a transformer whose backward pass is written by hand.",
        "",
        *(f"  python -m manual_backprop.{name:<10} {about}" for name, about in there.items()),
        "",
        "Each takes --help. This one takes --version.",
    ]
    if given and given not in (["--help"], ["-h"]):
        from manual_backprop.common.errors import EXIT_BAD_INPUT
        from manual_backprop.config.rules import nearest

        meant = given[0] if given[0] in there else nearest(given[0], list(there))
        way_out = f"; did you mean python -m manual_backprop.{meant}?" if meant else ""
        print(f"{given[0]}: there is no such option{way_out}\n", *listed, sep="\n", file=sys.stderr)
        return EXIT_BAD_INPUT
    print("\n".join(listed))
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
