"""The pictures of a sweep: its loss curves in one figure, and a heat map if two keys were swept."""

from collections.abc import Sequence
from pathlib import Path

from manual_backprop.common.pictures import new_figure, picture, save_figure, with_grid
from manual_backprop.tracking import Series, TrainingLog, load_training_log
from manual_backprop.training.comparison.runs import LOSS
from manual_backprop.training.sweeps.records import FINISHED, JobRecord, best_first, ranking, swept_values

MOST_NAMED = 12  # curves in a legend
SHARE = 20  # a training curve is drawn as the means of at most so many equal parts


@picture
def draw_curves(records: Sequence[JobRecord], path: Path, title: str) -> bool:
    """Writes a PNG: loss over tokens seen, so that runs with different batch sizes compare. False without a curve."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    runs = [(record, log) for record in best_first(records) if (log := _log(record)) is not None]
    if not runs:
        return False
    metric = ranking(records)
    digits = ".3f" if metric.name == LOSS else ".4g"
    figure = new_figure(8, 4.8, dpi=120)
    axes = figure.subplots()
    lowest, highest = float("inf"), 0.0
    for place, (record, log) in enumerate(runs):
        color = colormaps["viridis"](0.85 * place / max(1, len(runs) - 1))
        label = record.title + ("" if record.status == FINISHED else f" ({record.status})")
        training, validation = _smooth(log.training["train/loss"]), log.validation.get("validation/loss")
        axes.plot(_tokens_seen(log, training.steps), training.values, color=color, linewidth=1.2, alpha=0.8)
        if validation is not None:
            points = _tokens_seen(log, validation.steps)
            axes.plot(points, validation.values, color=color, marker="o", markersize=4, linewidth=0)
        if (ranked := log.validation.get(metric.name)) is not None:
            label = f"{ranked.values[-1]:{digits}}  {label}"
        axes.plot([], [], color=color, marker="o", markersize=4, label=label if place < MOST_NAMED else None)
        finite = [value for value in training.values if value < float("inf")]
        highest = max([highest, *finite[:1]])
        lowest = min([lowest, *finite, *(validation.values if validation else [])])
    if highest > lowest:
        room = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - room, highest + room)  # a diverging run may leave the picture; the others stay visible
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss [nats per token]")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2.5M
    axes.set_title(title, fontsize=11)
    with_grid(axes)
    more = f" (and {len(runs) - MOST_NAMED} more)" if len(runs) > MOST_NAMED else ""
    axes.legend(frameon=False, fontsize=8, title=f"{metric.title}, best first{more}", title_fontsize=8)
    save_figure(figure, path)
    return True


@picture
def draw_heat_map(records: Sequence[JobRecord], path: Path, title: str) -> bool:
    """Writes a PNG: what ranks the jobs, for each pair of values. False unless exactly two keys were swept."""
    pairs = {record.number: swept_values(record) for record in records}
    keys = list(dict.fromkeys(key for pair in pairs.values() for key in pair))
    values = [_in_order({pair[key] for pair in pairs.values() if key in pair}) for key in keys]
    if len(keys) != 2 or min(map(len, values)) < 2:
        return False
    metric = ranking(records)
    digits, unit = (".3f", " [nats per token]") if metric.name == LOSS else (".4g", "")
    cells = [[float("nan")] * len(values[1]) for _ in values[0]]
    for record in records:
        if record.status == FINISHED and (value := record.value(metric)) is not None:
            row, column = (values[axis].index(pairs[record.number][keys[axis]]) for axis in (0, 1))
            cells[row][column] = value
    known = [value for row in cells for value in row if value == value]
    if not known:
        return False
    bright = min(known) + 0.6 * (max(known) - min(known))  # text on brighter cells is dark
    figure = new_figure(2.5 + 1.1 * len(values[1]), 2 + 0.7 * len(values[0]), dpi=120)
    axes = figure.subplots()
    image = axes.imshow(cells, cmap="viridis", aspect="auto")
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            text = f"{value:{digits}}" if value == value else "-"
            axes.text(column, row, text, ha="center", va="center", color="white" if value <= bright else "black")
    axes.set_xticks(range(len(values[1])), values[1])
    axes.set_yticks(range(len(values[0])), values[0])
    axes.set_xlabel(keys[1])
    axes.set_ylabel(keys[0])
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label=f"{metric.title}{unit}")
    save_figure(figure, path)
    return True


def _log(record: JobRecord) -> TrainingLog | None:
    if record.run_directory is None or not (Path(record.run_directory) / "metrics.jsonl").is_file():
        return None
    log = load_training_log(record.run_directory)
    return log if "train/loss" in log.training else None


def _tokens_seen(log: TrainingLog, steps: Sequence[int]) -> list[float]:
    from numpy import interp

    seen = log.training["tokens_seen"]
    return [float(tokens) for tokens in interp(steps, [0, *seen.steps], [0.0, *seen.values])]


def _smooth(series: Series) -> Series:
    """Means of equal parts of a curve: the noise of single batches would hide which run is better."""
    size = max(1, len(series.steps) // SHARE)
    parts = [slice(first, first + size) for first in range(0, len(series.steps), size)]
    means = [sum(series.values[part]) / len(series.values[part]) for part in parts]
    return Series([series.steps[part][-1] for part in parts], means)


def _in_order(values: set[str]) -> list[str]:
    """Sorted; as numbers if all of them are numbers."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)
