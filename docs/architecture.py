"""`python docs/architecture.py` draws docs/architecture.svg: what a training is made of, and where each part lives.

A box has a title, the folder of the package that it stands for, and lines of text. Needs Python alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 1000, 752
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
TITLE, TEXT = 15.0, 12.0  # heights of letters
LETTER, BOLD, FIXED = 0.56, 0.68, 0.61  # width of a letter over its height, in the widest of these fonts, on average
INK, FAINT = "#1f2933", "#5b6775"
INPUT, LOOP, OUTPUT, HAND, PEER, PARTS = "#fff5da", "#e4edfb", "#f8e8f3", "#d9f2df", "#f2f2f2", "#eaf7ed"


@dataclass(frozen=True)
class Box:
    x: int
    y: int
    width: int
    height: int
    fill: str
    title: str
    folder: str
    lines: tuple[str, ...] = ()

    def svg(self) -> list[str]:
        """The frame and its texts. Raises ValueError for a text that is too long for it."""
        inside = self.width - 24
        assert_fits(self.title, BOLD * TITLE, inside - 8 - FIXED * TEXT * len(self.folder))
        for line in self.lines:
            assert_fits(line, LETTER * TEXT, inside)
        left, right = self.x + 12, self.x + self.width - 12
        return [
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="8" '
            f'fill="{self.fill}" stroke="{FAINT}"/>',
            text(left, self.y + 24, self.title, TITLE, 'font-weight="bold"'),
            text(right, self.y + 24, self.folder, TEXT, 'text-anchor="end" font-family="monospace"', FAINT),
            *(text(left, self.y + 45 + 17 * number, line) for number, line in enumerate(self.lines)),
        ]


def assert_fits(words: str, letter: float, width: float) -> None:
    if letter * len(words) > width:
        raise ValueError(f"{words!r} needs {letter * len(words):.0f} and has {width:.0f}: say it shorter")


def text(x: int, y: int, words: str, size: float = TEXT, style: str = "", colour: str = INK) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size:g}" fill="{colour}" {style}>{escape(words)}</text>'


def label(x: int, y: int, words: str, anchor: str = "start") -> str:
    """Words beside an arrow."""
    return text(x, y, words, TEXT, f'font-style="italic" text-anchor="{anchor}"', FAINT)


def arrow(*corners: tuple[int, int], both: bool = False) -> str:
    points = " ".join(f"{x},{y}" for x, y in corners)
    start = 'marker-start="url(#head)" ' if both else ""
    return f'<polyline points="{points}" fill="none" stroke="{INK}" stroke-width="1.4" {start}marker-end="url(#head)"/>'


def pill(x: int, y: int, words: str) -> list[str]:
    """One part of an optimizer step."""
    return [
        f'<rect x="{x}" y="{y}" width="90" height="34" rx="17" fill="white" stroke="{FAINT}"/>',
        text(x + 45, y + 22, words, TEXT, 'text-anchor="middle"'),
    ]


BOXES = (
    Box(
        *(20, 60, 230, 98, INPUT, "Configuration", "config/"),
        ("groups and keys from conf/,", "composed by Hydra, checked", "before anything is built"),
    ),
    Box(
        *(20, 178, 230, 82, INPUT, "Data", "data/"),
        ("texts, pairs, labels, series;", "tokenizers, cached corpus"),
    ),
    Box(
        *(20, 280, 230, 98, INPUT, "Task", "tasks/"),
        ("what is learned: examples,", "batches, metrics,", "predictions"),
    ),
    Box(
        *(320, 60, 360, 318, LOOP, "Runner", "training/"),
        ("one optimizer step after the other;", "evaluation, samples, signals, resume, sweeps"),
    ),
    Box(
        *(750, 60, 230, 66, OUTPUT, "Tracking", "tracking/"),
        ("run directory, then MLflow",),
    ),
    Box(
        *(750, 144, 230, 66, OUTPUT, "Compared", "visualizer/"),
        ("a page, and notebooks",),
    ),
    Box(
        *(750, 228, 230, 66, OUTPUT, "Saved", "checkpoints/"),
        ("safetensors with SHA-256",),
    ),
    Box(
        *(750, 312, 230, 66, OUTPUT, "Used", "trained_models/"),
        ("evaluate, generate, convert",),
    ),
    Box(
        *(36, 448, 270, 82, PEER, "Mirror", "mirror.py"),
        ("the same lines under autograd:", "the proof (implementation=torch)"),
    ),
    Box(
        *(365, 448, 270, 82, HAND, "By hand", "custom.py"),
        ("forward and backward, no autograd:", "the subject (implementation=custom)"),
    ),
    Box(
        *(694, 448, 270, 82, PEER, "Baseline", "baseline.py"),
        ("torch.nn, torch.compile: the peer", "(implementation=baseline)"),
    ),
    Box(
        *(20, 584, 300, 82, PARTS, "The calculus", "ops/"),
        ("textbook pairs, forward and backward;", "each docstring is the derivation"),
    ),
    Box(
        *(350, 584, 300, 82, PARTS, "The same pairs, fast", "kernels/"),
        ("C++ on a CPU, Triton on a GPU;", "same names, signatures and tests"),
    ),
    Box(
        *(680, 584, 300, 82, PARTS, "Update", "optim/"),
        ("AdamW, SGD, schedules; parameters,", "gradients, moments in flat buffers"),
    ),
    Box(
        *(20, 686, 300, 50, "white", "Proof, benchmark", "study/"),
    ),
    Box(
        *(350, 686, 300, 50, "white", "Tokenize, measure", "tools/"),
    ),
    Box(
        *(680, 686, 300, 50, "white", "Errors, safe files", "common/"),
    ),
)

STEP = (  # forward along the upper row, backward along the lower one
    *(pill(345, 172, "batch") + pill(455, 172, "forward") + pill(565, 172, "loss")),
    *(pill(345, 282, "update") + pill(455, 282, "clip") + pill(565, 282, "backward")),
    *(arrow((435, 189), (453, 189)), arrow((545, 189), (563, 189)), arrow((610, 206), (610, 280))),
    *(arrow((565, 299), (547, 299)), arrow((455, 299), (437, 299)), arrow((390, 282), (390, 208))),
    label(500, 249, "dloss = 1", "middle"),
)

FLOW = (
    arrow((250, 109), (318, 109)),
    arrow((135, 260), (135, 278)),
    arrow((250, 329), (318, 329)),
    arrow((680, 93), (748, 93)),
    arrow((865, 126), (865, 142)),
    arrow((682, 261), (748, 261), both=True),
    arrow((865, 294), (865, 310)),
    *(arrow((500, 378), (500, 410)), label(510, 399, "loss_and_gradients(batch)")),
    *(arrow((308, 489), (363, 489), both=True), label(335, 480, "verify", "middle")),
    *(arrow((637, 489), (692, 489), both=True), label(664, 480, "bench", "middle")),
    *(arrow((450, 530), (450, 562), (170, 562), (170, 582)), arrow((500, 530), (500, 582))),
    arrow((830, 540), (830, 582)),
    arrow((322, 625), (348, 625), both=True),
)

SEAM = (
    f'<rect x="20" y="412" width="960" height="128" rx="8" fill="none" stroke="{FAINT}" stroke-dasharray="5 4"/>',
    text(36, 436, "Network", TITLE, 'font-weight="bold"'),
    label(124, 436, "three levels behind one seam: the same names, the same weights, the same loop"),
    text(968, 436, "models/", TEXT, 'text-anchor="end" font-family="monospace"', FAINT),
)


def picture() -> str:
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONT}">',
        "<title>From a command line to a trained model, and the folders of manual_backprop</title>",
        f"<defs>{head}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="white"/>',
        text(20, 36, "From a command line to a trained model", 20, 'font-weight="bold"'),
        text(980, 36, "folders of manual_backprop/", TEXT, 'text-anchor="end" font-family="monospace"', FAINT),
        *(line for box in BOXES for line in box.svg()),
        *STEP,
        *SEAM,
        *FLOW,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE}")
