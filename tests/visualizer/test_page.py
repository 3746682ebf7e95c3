"""The visualizer's page in a real headless Chromium, used like by a person. Skipped with a reason without Chromium.

Every page must leave the console empty and send no request to another machine. test_server.py tests the server without
a browser.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_tools import command, free_port, serving, wait_until
from logged_runs import write_run

from manual_backprop.tracking import TrainingLogger, create_run_directory

pytestmark = pytest.mark.nightly
SLOWEST = 30  # [s]
EVIL = "<script>alert('$x$')</script><b>bold</b>"


def losses(start: float, end: float, steps: int) -> list[float]:
    return [end + (start - end) * math.exp(-5 * step / steps) for step in range(steps)]


@pytest.fixture(scope="module")
def root(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs; a larger model starts worse and ends better."""
    root = tmp_path_factory.mktemp("page")
    for number, name in enumerate(["oldest", "older", EVIL, "n" * 300, "tiny", "small"]):
        size, steps = number + 1, 400
        curve = losses(5 + number, 4 - 0.3 * number, steps)
        measured = {step: curve[step - 1] for step in range(40, steps + 1, 40)}
        path = write_run(root, name, curve, 1, measured, rate=1e9 * size, config={"optimizer": {"learning_rate": size}})
        for step in (40, 400):
            (path / "samples" / f"step-{step:06d}.txt").write_text(f"{number} after {step}\n")
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    address = f"http://127.0.0.1:{(port := free_port())}/"
    with serving("--port", str(port), module="manual_backprop.visualize", cwd=root, address=address):
        yield address


class Seen:
    """An open page; `end` checks that it has logged no errors and sent no foreign requests."""

    def __init__(self, browser: Any, **context: Any):
        self.context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}} | context)
        self.context.set_default_timeout(SLOWEST * 1000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append("a dialog"))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, address: str, tab: str = "", **state: object) -> Any:
        given = ({"tab": tab} if tab else {}) | state
        self.page.goto(address + "#" * bool(given) + "&".join(f"{name}={value}" for name, value in given.items()))
        self.shown(tab)
        return self.page

    def shown(self, tab: str = "") -> None:
        self.page.locator(f"body[data-shown^='{tab}']" if tab else "body[data-shown]").wait_for()

    def drawn(self, place: str) -> Any:
        """What plotly has drawn in an element."""
        self.page.locator(f"{place} .main-svg").first.wait_for(state="attached")
        return self.page.evaluate(DRAWN, place)

    def end(self, address: str) -> None:
        self.context.close()
        assert self.said == []
        assert [url for url in self.asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def seen(browser: Any, address: str) -> Iterator[Seen]:
    seen = Seen(browser)
    yield seen
    seen.end(address)


LOSS = ".chart[data-key='loss']"
DRAWN = """place => {
  const one = document.querySelector(place);
  const lines = one._fullData.map(trace => ({name: trace.name, x: [...trace.x], y: [...trace.y]}));
  return {x: one.layout.xaxis.title.text, type: one.layout.xaxis.type, lines};
}"""
RANGES = """place => ['yaxis', 'yaxis2'].map(
  axis => document.querySelector(place).layout[axis].range.map(edge => Number(edge.toFixed(9))))"""
FOCUSED = """(() => {
  const one = document.activeElement;
  return (one.getAttribute('aria-label') || one.labels?.[0]?.innerText || one.innerText || '').trim();
})()"""


def test_runs_are_chosen(seen: Seen, address: str) -> None:
    """The newest four at first; filter, sort, tick and untick; the address keeps it."""
    page = seen.open(address)
    assert page.locator(".chip").count() == 4
    assert page.get_by_text("6 of 6 runs, 4 chosen").is_visible()
    page.get_by_label("Filter").fill("olde")
    assert page.locator("#runs tbody tr").count() == 2
    page.get_by_label("choose oldest").check()
    assert page.locator(".chip").count() == 5
    assert page.locator(".chip.faint").count() == 1, "the fifth is faint"
    page.get_by_role("button", name="Curves").click()
    seen.shown("curves")
    page.get_by_role("button", name="1 are faint: four more in full").click()
    page.locator(".chip.faint").wait_for(state="detached")
    before = page.url
    page.reload()
    seen.shown("curves")
    assert page.url == before
    assert page.locator(".chip").count() == 5
    page.get_by_role("button", name="leave out oldest").click()
    assert page.locator(".chip").count() == 4
    page.go_back()
    seen.shown("choose")
    page.get_by_label("Filter").fill("")
    page.get_by_role("button", name="Best", exact=False).click()
    first = page.locator("#runs tbody tr").first.inner_text()
    page.get_by_role("button", name="Best", exact=False).click()
    assert page.locator("#runs tbody tr").last.inner_text() == first


def test_names_are_text(seen: Seen, address: str) -> None:
    page = seen.open(address, "curves")
    assert page.get_by_text(EVIL).first.is_visible()
    assert page.locator("b", has_text="bold").count() == 0
    box = page.locator(f"{LOSS} .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 20)
    names = {trace["name"] for trace in seen.drawn(LOSS)["lines"]}
    assert len(names) == 4
    assert all(len(name) < 120 for name in names)


def test_hovering_says_what_a_point_is(seen: Seen, address: str) -> None:
    page = seen.open(address, "curves")
    seen.drawn(LOSS)
    box = page.locator(f"{LOSS} .nsewdrag").first.bounding_box()
    texts = []
    for share in range(5, 100, 5):
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * share / 100)
        page.wait_for_timeout(120)
        texts += page.locator(f"{LOSS} .hoverlayer .hovertext").all_text_contents()
    assert any("small" in text and "loss" in text and "step" in text for text in texts), texts


def test_the_axis_is_changed_and_one_zooms_in(seen: Seen, address: str) -> None:
    page = seen.open(address, "curves")
    assert seen.drawn(LOSS)["x"] == "optimizer steps"
    page.get_by_label("Against").select_option("FLOPs")
    page.get_by_label("log x").check()
    wait_until(lambda: (drawn := seen.drawn(LOSS))["x"] == "FLOPs" and drawn["type"] == "log")
    assert "x=flops" in page.url
    assert "lx=1" in page.url
    page.get_by_label("log x").uncheck()
    page.get_by_label("Smoothing").select_option("50 points")
    wait_until(lambda: len(seen.drawn(LOSS)["lines"]) == 12)  # training raw and smooth, and validation
    box = page.locator(f"{LOSS} .nsewdrag").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Whole range").wait_for()
    assert "z=" in page.url
    wait_until(lambda: max(max(line["x"]) for line in seen.drawn(LOSS)["lines"] if line["x"]) < 2.4e12 * 0.7)
    page.get_by_role("button", name="Whole range").click()
    wait_until(lambda: max(max(line["x"]) for line in seen.drawn(LOSS)["lines"] if line["x"]) == pytest.approx(2.4e12))


def test_loss_and_perplexity_stay_locked(seen: Seen, address: str, root: Path) -> None:
    path = write_run(root, "perplexing", validation={})
    logger = TrainingLogger(path)
    for step, loss in ((10, 5.0), (20, 4.0), (30, 3.0)):
        logger.log_validation(step, {"loss": loss, "perplexity": math.exp(loss)})
    logger.finish()
    place = ".chart[data-key='validation']"
    page = seen.open(address, "curves", runs=path.name)
    seen.drawn(place)
    page.locator(f"{place} .y2tick").first.wait_for()
    box = page.locator(f"{place} .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.6, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Whole range").wait_for()
    page.wait_for_timeout(500)
    first, second = page.evaluate(RANGES, place)
    assert first == second
    assert first[1] - first[0] < 1.2, "and it is the part that was chosen"
    assert page.locator(f"{place} .y2tick").count() >= 2
    shutil.rmtree(path)


def test_the_budget(seen: Seen, address: str) -> None:
    """The slider by its keys: every run's loss at equal compute, and sentences."""
    page = seen.open(address, "compute")
    seen.drawn("#compute-chart")
    assert page.locator("#sentences li").count() == 6
    assert "FLOPs small leads tiny" in page.locator("#sentences").inner_text()
    slider = page.get_by_label("Budget")
    slider.focus()
    page.keyboard.press("End")
    assert page.locator("#budget-value").inner_text() == "2.40e12 FLOPs"
    table = page.locator("#budget-table").inner_text()
    assert "not measured there (from 2.00e11 to 2.00e12)" in table
    page.keyboard.press("Home")
    assert page.locator("#budget-value").inner_text() == "1.20e11 FLOPs"
    for _ in range(5):
        page.keyboard.press("PageUp")
    assert "budget=" in page.url
    budget = page.locator("#budget-value").inner_text()
    page.reload()
    seen.shown("compute")
    assert page.locator("#budget-value").inner_text() == budget
    shapes = page.evaluate("document.querySelector('#compute-chart').layout.shapes.at(-1).x0")
    assert f"{shapes:.2e}".replace("+", "") == budget.removesuffix(" FLOPs")


def test_tables_and_samples(seen: Seen, address: str) -> None:
    page = seen.open(address, "tables")
    best = page.locator(".card.best")
    assert best.count() == 1
    assert "small" in best.inner_text()
    assert page.locator("#configs tr").nth(1).inner_text().split()[0] == "optimizer.learning_rate"
    page.get_by_role("button", name="Samples").click()
    seen.shown("samples")
    page.get_by_text("5 after 400").wait_for()
    page.get_by_label("After step").focus()
    page.keyboard.press("Home")
    page.get_by_text("5 after 40", exact=True).wait_for()
    assert page.get_by_text("4 after 40", exact=True).is_visible()


def test_by_keyboard_alone(seen: Seen, address: str) -> None:
    """From the top of the page: to the curves, to another axis, and back to a run's box."""
    page = seen.open(address)

    def tab_to(label: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate(FOCUSED)
            if focused.startswith(label):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", "one sees where one is"
                return
        raise AssertionError(f"no way to {label}")

    tab_to("choose tiny")
    page.keyboard.press("Space")
    page.get_by_text("6 of 6 runs, 3 chosen").wait_for()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "choose tiny", "where one was"
    page.evaluate("document.activeElement.blur()")
    tab_to("Curves")
    page.keyboard.press("Enter")
    seen.shown("curves")
    tab_to("Against")
    page.keyboard.type("tok")
    wait_until(lambda: seen.drawn(LOSS)["x"] == "tokens seen")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(scheme: str, browser: Any, address: str) -> None:
    """Nothing is wider than the screen, in any view; and text stands out from the paper."""
    seen = Seen(browser, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    for tab in ("choose", "curves", "compute", "tables", "samples", "model"):
        page = seen.open(address, tab)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
        ink, paper = (
            [
                int(part)
                for part in page.evaluate(f"getComputedStyle(document.documentElement).{name}")
                .strip("rgb()")
                .split(",")
            ]
            for name in ("color", "backgroundColor")
        )
        assert abs(sum(ink) - sum(paper)) > 450
        assert (sum(paper) > 600) == (scheme == "light")
    seen.end(address)


def test_a_running_run_grows(browser: Any, tmp_path: Path) -> None:
    directory = create_run_directory(tmp_path / "outputs", "growing")
    logger = TrainingLogger(directory.path)
    logger.log_step(1, {"train/loss": 3.0})
    address = f"http://127.0.0.1:{(port := free_port())}/"
    with serving("--port", str(port), module="manual_backprop.visualize", cwd=tmp_path, address=address):
        seen = Seen(browser)
        page = seen.open(address, "curves")
        assert seen.drawn(LOSS)["lines"][0]["y"] == [3.0]
        page.locator(".chip", has_text="running").wait_for()
        page.wait_for_timeout(2500)  # it has looked once
        for step in (2, 3, 4):
            logger.log_step(step, {"train/loss": 3.0 - step / 10})
        wait_until(lambda: seen.drawn(LOSS)["lines"][0]["y"] == [3.0, 2.8, 2.7, 2.6])
        logger.finish("FAILED")
        page.get_by_text("growing has failed at step 4").wait_for()
        page.locator(".chip", has_text="failed").wait_for()
        directory.resume(3)
        page.get_by_text("growing was resumed after step 3").wait_for()
        seen.end(address)
    directory.release()


def test_an_export_opens_without_a_network(browser: Any, seen: Seen, address: str, tmp_path: Path) -> None:
    """What the button gives: one file, the same view, and its controls work."""
    page = seen.open(address, "curves", x="tokens")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "runs.html"
    download.value.save_as(file)
    alone = Seen(browser, offline=True)
    opened = alone.open(file.as_uri())
    assert alone.drawn(LOSS)["x"] == "tokens seen", "the view as it was"
    opened.get_by_label("Against").select_option("FLOPs")
    wait_until(lambda: alone.drawn(LOSS)["x"] == "FLOPs")
    opened.get_by_label("log y").check()
    wait_until(lambda: opened.evaluate("document.querySelector('.chart').layout.yaxis.type") == "log")
    opened.get_by_role("button", name="Equal compute").click()
    alone.shown("compute")
    opened.get_by_label("Budget").focus()
    opened.keyboard.press("End")
    assert opened.locator("#budget-value").inner_text() == "2.40e12 FLOPs"
    opened.get_by_role("button", name="Tables").click()
    assert opened.locator(".card.best").count() == 1
    opened.get_by_role("button", name="Samples").click()
    opened.get_by_text("5 after 400").wait_for()
    alone.end("file://")


def test_a_model_at_a_text(browser: Any, finished: Path, tmp_path: Path) -> None:
    """Types a text, looks at the result, and hovers over the attention map."""
    address = f"http://127.0.0.1:{(port := free_port())}/"
    given = ("--port", str(port), str(finished))
    with serving(*given, module="manual_backprop.visualize", cwd=finished.parent.parent.parent, address=address):
        seen = Seen(browser)
        page = seen.open(address, "model")
        page.get_by_label("Text").fill("the owl")
        page.keyboard.press("Enter")
        page.locator("#maps .main-svg").first.wait_for()
        assert page.locator("#next tr").count() == 8
        box = page.locator("#maps .nsewdrag").first.bounding_box()
        page.mouse.move(box["x"] + 6, box["y"] + 6)
        page.locator("#maps .hovertext", has_text="looks at").wait_for()
        page.get_by_label("Text").fill("owl")
        page.get_by_role("button", name="Look").click()
        page.locator("#next tr").nth(4).wait_for(state="detached")
        seen.end(address)
    file = tmp_path / "model.html"
    given = (str(finished), "--text", "the owl", "--export", str(file))
    done = command(*given, module="manual_backprop.visualize", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = Seen(browser, offline=True)
    page = alone.open(file.as_uri())
    page.locator("#maps .hm image").first.wait_for(state="attached")
    assert page.locator("#next tr").count() == 8
    alone.end("file://")


def test_four_long_runs_are_there_at_once(browser: Any, tmp_path: Path) -> None:
    """With 100,000 rows each the first picture appears within 2 seconds after reading; it shows a spike of one step."""
    for number in range(4):
        path = write_run(tmp_path, f"long {number}", losses=[], validation={})
        with (path / "metrics.jsonl").open("a") as file:
            for step in range(1, 100_001):
                loss = 50.0 if step == 33_333 else 3 + number + step % 11 / 50
                metrics = {"train/loss": loss, "gradient_norm": 1.0, "tokens_seen": 100 * step, "flops": 10**6 * step}
                file.write(json.dumps({"step": step, "time_ms": 1_700_000_000_000 + step, "metrics": metrics}) + "\n")
    address = f"http://127.0.0.1:{(port := free_port())}/"
    with serving("--port", str(port), module="manual_backprop.visualize", cwd=tmp_path, address=address):
        seconds = []
        for _ in range(3):
            seen = Seen(browser)
            begin = time.perf_counter()
            seen.open(address, "curves")
            lines = seen.drawn(LOSS)["lines"]
            seconds.append(time.perf_counter() - begin)
            assert all(50.0 in line["y"] for line in lines)
            seen.end(address)
        print(json.dumps(seconds))
        assert min(seconds) < 2
