"""`mlflow ui` as a person sees it, in a real headless Chromium: a sweep is opened, two of its runs are compared.

Skips, and says why, where there is no Chromium (Debian: `apt-get install chromium`) or no playwright (the extra
`browser`). Nothing but this machine is asked: the page and all its parts come from the server that is started here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_tools import PATIENCE, command, free_port, serving
from run_tools import small, write_text

from manual_backprop.tracking.run_directory import SWEEPS, list_runs, read_run
from manual_backprop.training.sweeps.records import runs_of_sweep

pytestmark = pytest.mark.nightly
SWEEP = small(
    *("dataset.path=text.txt", "tracking=mlflow", "training.sample_length=8", "training.eval_every=5"),
    "optimizer.learning_rate=1e-3,1e-2",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Path:
    """A folder with a sweep of two jobs."""
    root = tmp_path_factory.mktemp("sweep")
    write_text(root / "text.txt")
    done = command("-m", *SWEEP, cwd=root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    """Of an MLflow server on this folder."""
    port = free_port()
    given = ("ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    address = f"http://127.0.0.1:{port}"
    with serving(*given, module="mlflow", cwd=root, address=f"{address}/health", MLFLOW_DISABLE_TELEMETRY="true"):
        yield address


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    yield page
    context.close()


def ids(root: Path) -> tuple[str, list[str], str]:
    """In MLflow: of the experiment, of the sweep's runs, and of the sweep."""
    from mlflow import MlflowClient

    (sweep,) = list_runs(root / "outputs", SWEEPS)
    parent, *children = [read_run(path)["mlflow"]["run_id"] for path in (sweep, *runs_of_sweep(sweep))]
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    return client.get_run(parent).info.experiment_id, children, parent


def open_runs(page: Any, address: str, experiment: str, view: str = "") -> None:
    """The experiment's runs, with the sweep unfolded."""
    page.goto(f"{address}/#/experiments/{experiment}/runs{view}", wait_until="domcontentloaded")
    sweep = page.get_by_role("row").filter(has_text="sweep of learning_rate").first
    sweep.wait_for()
    if not page.get_by_role("row").filter(has_text="learning_rate=0.01").count():
        sweep.get_by_role("button").first.click()
    page.get_by_role("row").filter(has_text="learning_rate=0.01").first.wait_for()


def test_two_runs_of_a_sweep_are_compared(root: Path, address: str, page: Any) -> None:
    """By clicks alone: the sweep, its two runs, Compare; then what differs is in front and nothing else."""
    asked_elsewhere = []
    page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else asked_elsewhere.append(request.url))  # fmt: skip  # noqa: E501
    experiment, _, _ = ids(root)
    open_runs(page, address, experiment)
    for rate in ("0.001", "0.01"):
        row = page.get_by_role("row").filter(has_text=f"learning_rate={rate}").first
        row.get_by_role("checkbox", name="Press Space").first.check()
    page.get_by_role("button", name="Compare", exact=True).first.click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    page.get_by_text("Show diff only").first.click()
    page.get_by_text("optimizer.learning_rate", exact=True).first.wait_for()
    text = page.inner_text("body")
    parameters = text[text.index("Parameters\nShow diff only") : text.index("Metrics\nShow diff only")]
    assert parameters.split()[4:] == ["optimizer.learning_rate", "0.001", "0.01"] or parameters.split()[4:] == [
        "optimizer.learning_rate", "0.01", "0.001",
    ], parameters  # fmt: skip
    metrics = text[text.index("Metrics\nShow diff only") :]
    assert "validation/loss" in metrics
    assert "train/loss" in metrics
    assert "learning_rate=0.01" in text
    assert asked_elsewhere == []


def test_curves_of_a_sweep(root: Path, address: str, page: Any) -> None:
    """A section for training and one for validation; every run has its curve; steps run from left to right."""
    experiment, _, _ = ids(root)
    open_runs(page, address, experiment, "?compareRunsMode=CHART")
    chart = page.locator("[data-testid='experiment-view-compare-runs-card']").filter(has_text="train/loss").first
    chart.scroll_into_view_if_needed()
    chart.locator(".scatterlayer path.js-line").nth(1).wait_for(state="attached")
    shown = chart.inner_text()
    assert "Step" in shown, shown
    assert "learning_rate=0.001 (train/loss)" in shown, shown
    assert "learning_rate=0.01 (train/loss)" in shown, shown
    page.get_by_placeholder("Search metric charts").fill("^validation/loss$")
    chart = page.locator("[data-testid='experiment-view-compare-runs-card']").filter(has_text="validation/loss").first
    chart.locator(".scatterlayer path.js-line").nth(1).wait_for(state="attached")


def test_samples_of_a_run(root: Path, address: str, page: Any) -> None:
    """What the model wrote can be read in the browser, after the steps that its name says."""
    experiment, children, _ = ids(root)
    (sweep,) = list_runs(root / "outputs", SWEEPS)
    written = [
        (max(re.findall(r"[!-~]+(?: [!-~]+)*", sample.read_text(encoding="utf-8")), key=len), child, sample.name)
        for run, child in zip(runs_of_sweep(sweep), children, strict=True)
        for sample in (run / "samples").iterdir()
    ]
    words, child, name = max(written, key=lambda one: len(one[0]))  # after so few steps some write only blanks
    folder = f"{address}/#/experiments/{experiment}/runs/{child}/artifacts/samples/{name}"
    page.goto(folder, wait_until="domcontentloaded")
    page.get_by_text(name).first.wait_for()
    assert len(words) > len("The "), "what was written, and not only the prompt"
    page.get_by_text(words).first.wait_for()


def test_the_sweep_itself_has_its_table_and_pictures(root: Path, address: str, page: Any) -> None:
    experiment, _, parent = ids(root)
    page.goto(f"{address}/#/experiments/{experiment}/runs/{parent}", wait_until="domcontentloaded")
    page.get_by_text("tokens a second").first.wait_for()  # the table, as the description of the run
    page.goto(f"{address}/#/experiments/{experiment}/runs/{parent}/artifacts/curves.png", wait_until="domcontentloaded")
    page.locator("img[src*='curves.png'], img[alt*='curves'], img[src^='blob:']").first.wait_for()
