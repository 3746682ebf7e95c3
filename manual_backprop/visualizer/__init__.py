"""Compares runs in ways that MLflow's page does not: curves, equal compute, tables, samples, and a model's attention.

    series          metrics as arrays: the values of an x-axis, smoothing, reduction to the resolution of a screen
    figures         curves as plotly figures; style: their colours, axes and names; marks: events that curves do not
    show equal_compute   loss over FLOPs, and which run leads from where on
    tables          summaries and configs side by side
    parameters      the number of parameters of a config
    model_view      attention maps and likeliest tokens of a trained model
    runs            the runs of an outputs directory by id; mlflow_store: runs that are only in MLflow
    session         the answers to the page's requests; server: sends them to a browser; guard: refuses other browsers;
                    export: the page as one file
    page/           the code for the browser: HTML, CSS and a script without a framework

The same functions draw for the page and in a notebook, from logs by name:

    logs = {"tiny": load_training_log("4f1c2a"), "small": load_training_log("91be03")}
    create_loss_curves(logs, x="flops", log_x=True).show()

It only reads. Importing it imports neither plotly nor torch nor a server.
May import: training and below.
"""

from importlib import import_module
from typing import Any

# The module of each public name.
_HOMES = {
    "create_app": ".server",
    "create_flops_normalized_loss": ".equal_compute",
    "create_loss_curves": ".figures",
    "create_lr_schedule_plot": ".figures",
    "create_metric_plot": ".figures",
    "create_throughput_plot": ".figures",
    "create_validation_curves": ".figures",
    "estimate_model_params": ".parameters",
    "find_crossover_points": ".equal_compute",
    "launch": ".server",
    "load_training_log": "..tracking",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value
