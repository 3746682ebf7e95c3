"""docs/guide/side-by-side.md: what the command makes of the sources; all of them, and nothing else."""

from __future__ import annotations

import ast
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from manual_backprop import ops
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.mirror import TorchTransformer
from manual_backprop.study.explain.listing import slug
from manual_backprop.study.gradient_check import ROWS
from manual_backprop.study.side_by_side.alignment import Row, aligned, backward_rows
from manual_backprop.study.side_by_side.html import html
from manual_backprop.study.side_by_side.markdown import markdown
from manual_backprop.study.side_by_side.page import COMMAND, Page, made_page
from manual_backprop.study.side_by_side.statements import Statement, statements_in, statements_of
from manual_backprop.tools import side_by_side

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "guide" / "side-by-side.md"


@pytest.fixture(scope="module")
def page() -> Page:
    return made_page()


def without_autograds(text: str) -> str:
    """The page without what another version of PyTorch records otherwise."""
    text = re.sub(r"are those of torch \d+\.\d+", "", text)
    text = re.sub(r"; \d+ nodes that move numbers|, \d+ by autograd| \d+ \|$", "", text, flags=re.M)
    return re.sub(r"\| `\w+Backward\d`", "| ", text)


def test_the_committed_page_is_what_the_command_writes(page: Page) -> None:
    there, made = COMMITTED.read_text(encoding="utf-8"), markdown(page)
    if f"are those of torch {page.torch}." in there:
        assert there == made, f"{COMMITTED.name} is old: run `{COMMAND}`"
    there, made = without_autograds(there), without_autograds(made)
    # of a version that records more nodes than there are statements, rows hold nothing else
    rows = [[line for line in text.splitlines() if line.replace(" ", "") != "|||"] for text in (there, made)]
    assert rows[0] == rows[1], f"{COMMITTED.name} is old: run `{COMMAND}`"


def test_every_function_of_the_network_and_every_pair_is_there_once(page: Page) -> None:
    by_hand = {name for name, function in vars(CustomTransformer).items() if inspect.isfunction(function)}
    shown = [section.title for section in page.network]
    backwards = {f"{name.removesuffix('_forward')}_backward" for name in shown if name.endswith("_forward")}
    assert {*shown} | backwards == by_hand
    assert len(shown) == len(set(shown)) == sum(inspect.isfunction(f) for f in vars(TorchTransformer).values())
    assert sorted(section.title for section in page.pairs) == sorted(ROWS)


def test_every_statement_on_the_page_stands_in_its_file(page: Page) -> None:
    package = Path(inspect.getfile(ops)).parents[1]
    in_file: dict[str, set[str]] = {}
    seen = 0
    for section in page.sections:
        for file, side in zip(section.files, ("hand", "autograd"), strict=True):
            if file not in in_file:
                tree = ast.parse((package / file).read_text(encoding="utf-8"))
                in_file[file] = {ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.stmt)}
            rows = section.forward if side == "autograd" else section.forward + section.backward
            for statement in (getattr(row, side) for row in rows):
                if statement is not None and not statement.text.endswith(":"):
                    assert ast.dump(ast.parse(f"def f():\n {statement.text}").body[0].body[0]) in in_file[file]
                    seen += 1
    assert seen > 400


def test_what_is_computed_backward_stands_beside_the_statement_that_it_differentiates(page: Page) -> None:
    (attention,) = (section for section in page.network if section.title == "_attention_forward")
    of = {row.hand.text: row.of.text for row in attention.backward if row.hand is not None and row.of is not None}
    (linear,) = (right for left, right in of.items() if left.startswith("dcontext = ops.linear_backward"))
    assert linear.startswith('y = F.linear(context, *linear_of(p, "attention.output"))')
    (rotary,) = (right for left, right in of.items() if left.startswith("dqkv = ops.rotary_attention_backward"))
    assert rotary.startswith("context = rotary_attention_mirror(")
    (self_attention,) = (right for left, right in of.items() if left.startswith("dqkv = ops.self_attention_backward"))
    assert self_attention.startswith("context = self_attention_mirror(")
    calls = re.compile(r"(ops|self)\.\w+_backward\(")
    alone = {
        row.hand.text
        for section in page.network
        for row in section.backward
        if row.hand is not None and row.of is None and calls.search(row.hand.text)
    }
    assert {re.findall(r"\w+_backward", text)[0] for text in alone} == {
        "_pre_norm_block_backward",  # a block's cache waits in a list
        "_post_norm_block_backward",
    }


def test_statements_are_read_in_order_each_on_one_line() -> None:
    source = '''
def f(x, y):
    """Not this."""
    kept: Cache
    # why
    # and why
    a, cache = g(
        x,  # first
        (y,),
    )
    record("a", a)
    if x:
        return a
    elif y:
        record("x", x)
        a = "one  # two"
    else:
        for z in y:
            a += z
    if x:
        record("x", x)
    return a
'''
    assert statements_in(source.strip()) == [
        Statement("a, cache = g(x, (y,))", (), "# why and why"),
        Statement("if x:", ()),
        Statement("return a", ("if x:",)),
        Statement("elif y:", ()),
        Statement('a = "one  # two"', ("elif y:",)),
        Statement("else:", ()),
        Statement("for z in y:", ("else of elif y:",)),
        Statement("a += z", ("else of elif y:", "for z in y:")),
        Statement("return a", ()),
    ]


def test_likes_stand_beside_each_other_and_the_rest_alone() -> None:
    left = [Statement("y, cache = linear_forward(x, weight)"), Statement("z = 1"), Statement("return y, cache")]
    right = [Statement("y = F.linear(x, weight)"), Statement("return y")]
    rows = aligned(left, right)
    assert rows == [Row(left[0], right[0]), Row(left[1], None), Row(left[2], right[1])]
    assert aligned([], right) == [Row(None, right[0]), Row(None, right[1])]
    made = Statement("y, y_cache = linear_forward(x, weight)")
    (row,) = backward_rows([Statement("return linear_backward(dy, y_cache, dweight)")], [Row(made, right[0])])
    assert row.of == right[0]
    assert not any(row.same for row in rows)
    assert Row(right[0], right[0]).same


def test_autograds_graph_and_what_is_kept_are_counted(page: Page) -> None:
    of = {section.title: section.recorded for section in page.pairs}
    assert of["linear"].nodes == ("AddmmBackward0",)
    assert of["relu"].nodes == ("ReluBackward0",)
    assert (of["dropout"].kept_by_hand, of["dropout"].kept_by_autograd) == (0, 60), "a mask is drawn again by hand"
    assert of["linear"].kept_by_hand == of["linear"].kept_by_autograd == 60, "B T D numbers: x, and no weight"
    assert of["learned_positions"].kept_by_hand == of["learned_positions"].kept_by_autograd == 0


def test_the_tables_of_the_page_are_whole(page: Page) -> None:
    """Two columns in each, whatever the code holds; each link leads to a heading."""
    text = markdown(page)
    tables = text.partition("## The network")[2]
    for line in re.findall(r"^\|.*$", tables, flags=re.M):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    headings = {slug(line.lstrip("# ")) for line in text.splitlines() if line.startswith("### ")}
    assert {*re.findall(r"\]\(#([^)]*)\)", text)} == headings


class Looked(HTMLParser):
    """Tags that are open, and what a page asks others for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells, self.ids, self.asked = 0, [], []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.cells += tag == "td"
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []
        self.asked += [value for name, value in attributes if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_holds_the_same_and_asks_nobody(page: Page) -> None:
    text = html(page)
    looked = Looked()
    looked.feed(text)
    assert looked.open == []
    assert looked.cells == 2 * sum(len(section.forward) + len(section.backward) for section in page.sections)
    assert looked.asked == [f"#{name}" for name in looked.ids]
    assert "url(" not in text
    assert "dx = y_wide * (dy_wide - weighted_mean)" in text
    assert '"attention.qkv.weight"' not in text, "quotes and the like are escaped"


def test_the_command_writes_both_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side_by_side.main(["--markdown", str(tmp_path / "new" / "a.md"), "--html", str(tmp_path / "a.html")])
    assert (tmp_path / "new" / "a.md").read_text(encoding="utf-8").startswith("# By hand")
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out.count("28 pairs") == 2
    (tmp_path / "file").write_text("")
    words = ["--markdown", str(tmp_path / "file" / "a.md"), "--html", str(tmp_path / "b.html")]
    assert exit_code_of(lambda: side_by_side.main(words)) == 4
    assert "cannot write" in capsys.readouterr().err


def test_a_pair_is_read_as_it_is_written() -> None:
    texts = [statement.text for statement in statements_of(ops.softmax_backward)]
    assert texts[0] == "(y,) = cache"
    assert texts[-1] == "return dx.to(dy.dtype)"


@pytest.mark.nightly
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_fits_a_window_and_a_phone(page: Page, tmp_path: Path, browser: Any, width: int) -> None:
    """No line leaves its column, and the page is no wider than the window."""
    (tmp_path / "page.html").write_text(html(page), encoding="utf-8")
    window = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    window.on("request", lambda request: asked.append(request.url))
    window.goto((tmp_path / "page.html").as_uri())
    assert asked == [(tmp_path / "page.html").as_uri()]
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    assert window.evaluate("[...document.querySelectorAll('td')].every(cell => cell.scrollWidth <= cell.clientWidth)")
    window.close()
