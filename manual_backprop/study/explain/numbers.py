"""Prints tensors of a step: comment lines below the line of code that made them, with autograd's numbers beside them.

Each position of the input (or token of the vocabulary) is a row, labelled with its word. Heads are side by side, and so
are query, key and value. So nearly every activation of a step has three rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...config.schema import CustomTransformerConfig
from .trace import Value

WIDTH = 120  # of a line: what a page shows without scrolling
LABEL = 6  # of a row
NUMBER = 8  # a sign, two digits, the point, four decimals


def decimal(number: float, decimals: int = 4) -> str:
    written = f"{number:.{decimals}f}"
    return written.removeprefix("-") if float(written) == 0 else written


def scientific(number: float) -> str:
    return f"{number:.0e}" if number else "0"


@dataclass(frozen=True)
class Names:
    """The names of the rows and columns of an example's tensors: `read` of the positions T, `source` of the source's
    positions S, `vocabulary` of the rows of the embedding table, `inputs` of the numbers of a position without a table,
    `outputs` of the outputs of an encoder's head."""

    read: Sequence[str]
    source: Sequence[str] = ()
    vocabulary: Sequence[str] = ()
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()


class Numbers:
    """Writes the tensors of a network as text. Sizes that may occur in one shape, lengths included, must differ, since
    a size tells which letter a dimension has."""

    def __init__(self, config: CustomTransformerConfig, names: Names):
        self.config = config
        self.rows_named = {len(side): list(side) for side in (names.inputs, names.outputs, names.vocabulary) if side}
        self.columns_named = {len(side): list(side) for side in (names.outputs, names.vocabulary) if side}
        # length of a sequence -> its letter, and the labels of its positions
        self.places = {len(names.read): ("T", list(names.read))}
        if names.source:
            self.places[len(names.source)] = ("S", list(names.source))
        self.tensors = 0  # printed so far

    def letters(self, tensor: Tensor, places: bool = False) -> str:
        """(B, T, D): a shape in the alphabet. `places`: a matrix's rows are places T, else rows N of all texts."""
        config, shape = self.config, list(tensor.shape)
        names = {length: letter for length, (letter, _) in self.places.items()}
        if not places and len(shape) <= 2:
            names = {length: f"B{letter}" if self._two_stacks else "N" for length, letter in names.items()}
        names |= {config.d_model: "D", config.vocab_size: "V", config.d_ffn: "F", 3 * config.d_model: "3D", 1: "1"}
        names |= {size: letter for size, letter in ((config.n_inputs, "C"), (config.n_outputs, "O")) if size}
        if self._two_stacks:
            names[2 * config.d_model] = "2D"
        if config.traits.gated:
            names[2 * config.d_ffn] = "2F"
        if config.kv_heads != config.n_heads:
            names[(config.n_heads + 2 * config.kv_heads) * config.d_head] = "(H+2G)K"
        letters = [names.get(size, str(size)) for size in shape]
        if len(shape) == 2 and all(size in self.places for size in shape):
            letters = [self.places[size][0] for size in shape]
        if len(shape) > 1 and shape[0] == 1 and (len(shape) > 2 or shape[1] in self.places):
            letters = ["B", self.places[shape[1]][0]] if len(shape) == 2 else ["B", *letters[1:]]
        elif shape[0] == 1 and config.network == "encoder":  # which answers each sequence once
            letters = ["B", *letters[1:]]
        if self._heads_inside(tensor):
            letters[2] = "H" if shape[2] == config.n_heads else str(shape[2])
            letters[-1] = {config.d_head: "K", config.d_head // 2: "K/2"}.get(shape[-1], letters[-1])
        elif len(shape) == 4:
            letters[1] = "H"
            letters[3] = "K" if shape[3] == config.d_head else letters[3]
        return f"({', '.join(letters)})"

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """The matrices to print side by side: heads, or query, key and value, or the tensor itself."""
        if self._heads_inside(tensor):
            return list(tensor[0].flatten(1, -2).unbind(1))
        if tensor.dim() == 4:
            return list(tensor[0].unbind(0))
        matrix = tensor.reshape(-1, tensor.shape[-1])
        return list(matrix.split(self.config.d_model, dim=-1)) if self._packed(matrix) else [matrix]

    def _heads_inside(self, tensor: Tensor) -> bool:
        """(B, T, heads, K), where attention has (B, H, T, K)."""
        return tensor.dim() > 3 and tensor.shape[1] in self.places and tensor.shape[1] != self.config.n_heads

    def _packed(self, matrix: Tensor) -> list[str]:
        """The parts of a packed matrix: query, key and value; or, of an encoder's output, key and value."""
        many = matrix.shape[-1] / self.config.d_model
        return ["query", "key", "value"] if many == 3 else ["key", "value"] if many == 2 and self._two_stacks else []

    @property
    def _two_stacks(self) -> bool:
        return len(self.places) > 1

    def rows(self, tensor: Tensor, decimals: int = 4) -> list[str]:
        whole = not tensor.is_floating_point()

        def written(number: float) -> str:
            return (str(int(number)) if whole else decimal(number, decimals)).rjust(NUMBER)

        pieces = [piece.tolist() for piece in self.pieces(tensor)]
        return [" |".join("".join(map(written, row)) for row in side) for side in zip(*pieces, strict=True)]

    def fingerprint(self, tensor: Tensor) -> str:
        """Equal for tensors that print alike, heads side by side or not."""
        return "\n".join(self.rows(tensor)).replace(" |", "") if tensor.dim() else f"one number {float(tensor)}"

    def labels(self, tensor: Tensor) -> list[str]:
        count = self.pieces(tensor)[0].shape[0]
        return self.rows_named.get(count) or self._read(count) or [""] * count

    def _read(self, length: int) -> list[str]:
        """The names of the positions of the sequence with this length; none if there is no such sequence."""
        return self.places[length][1] if length in self.places else []

    def head(self, tensor: Tensor) -> list[str]:
        """The line above the columns, if they are words, heads, or query, key and value."""
        pieces = self.pieces(tensor)
        count, width = pieces[0].shape
        if width in self.columns_named or (width in self.places and (count == 1 or count in self.places)):
            words = self.columns_named.get(width) or self._read(width)
            return [" |".join("".join(word.rjust(NUMBER) for word in words) for _ in pieces)]
        names = [f"head {number}" for number in range(len(pieces))] if tensor.dim() >= 4 else []
        if len(pieces) > 1 and tensor.dim() < 4:
            names = self._packed(tensor)
        return [" |".join(name.rjust(NUMBER * width) for name in names)] if names else []

    def block(
        self, value: Value, title: str, indent: str, parameter: str | None = None, decimals: int = 4
    ) -> list[str]:
        """Comment lines with the numbers of a tensor. The title follows the first line; that of a gradient stands
        above, with autograd's numbers beside the gradient (below if both are too wide).

        `{shape}` in the title becomes the shape. `parameter` is the name of the parameter that the tensor is, or whose
        gradient it is added to: the weight of a matrix product is printed transposed, a column for each output.
        """
        self.tensors += 1
        tensor, autograd = value.numbers, None if value.part else value.autograd
        start = f"{indent}# "
        if tensor.dim() == 0:
            return [start + title.replace("{shape}", "") + f" = {decimal(float(tensor), decimals)}"]
        shape = f" {self.letters(tensor, bool(parameter))}"
        if parameter and tensor.dim() == 2 and "embedding" not in parameter and not parameter.startswith("head"):
            tensor, autograd = tensor.T, autograd.T if autograd is not None else None
            shape = f" transposed {self.letters(tensor, True)}"
        title = title.replace("{shape}", shape)
        if autograd is None:
            if tensor.is_floating_point() and not bool(tensor.any()):
                return [f"{start}{title}: all 0"]
            if tensor.dim() < 4 and tensor.shape[-1] == 1 and (words := self._read(len(self.labels(tensor)))):
                rows = zip(words, self.rows(tensor), strict=True)
                return [start + title + "".join(f"   {word} {row.strip()}" for word, row in rows)]
            lines = self._lines(tensor, start, decimals)
            together = f"{lines[0]}   {title}"
            return [together, *lines[1:]] if len(together) <= WIDTH else [start + title, *lines]
        note = f"autograd, within {scientific(value.difference or 0.0)}" + (f", for {parameter}" if parameter else "")
        by_hand, other = self._lines(tensor, "", decimals), self._lines(autograd, "", decimals)
        width = max(map(len, by_hand))
        if len(start) + 2 * width + 3 - LABEL > WIDTH:
            return [start + title, *(start + line for line in by_hand), start + note, *(start + line for line in other)]
        beside = [f"{start}{left:<{width}}   {right[LABEL:]}" for left, right in zip(by_hand, other, strict=True)]
        return [f"{start}{title:<{width}}   {note}", *beside]

    def _lines(self, tensor: Tensor, start: str, decimals: int) -> list[str]:
        lines = [f"{start}{'':{LABEL}}{line}" for line in self.head(tensor)]
        labelled = zip(self.labels(tensor), self.rows(tensor, decimals), strict=True)
        return lines + [f"{start}{label:<{LABEL}}{row}" for label, row in labelled]
