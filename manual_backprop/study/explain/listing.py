"""A traced step as listings: each pair that the network calls a section, each statement with the numbers that it made.

The numbers are `trace.py`'s, their layout is `numbers.py`'s, the words are those of words.toml; the page around the
sections is `page.py`'s.
"""

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...models.network import block_names, packed_names
from .autograd import TracedStep
from .numbers import WIDTH, Names, Numbers, decimal, scientific
from .trace import PACKAGE, Call, Step, Value
from .words import words_of

ALONE = {"decoder": "", "encoder": "encoder alone"}  # what words.toml calls the one stack of a network
FIXED = "position_embedding, fixed"  # the sinusoids, or the cosines and sines, which are not trained


@dataclass
class Section:
    """One pair that the network calls, with what the network does to its result."""

    number: int
    call: Call
    network_steps: list[tuple[Call, Step]]
    title: str
    about: str

    @property
    def direction(self) -> str:
        return "Backward" if self.call.backward else "Forward"

    @property
    def heading(self) -> str:
        return f"{self.direction} {self.number}: {self.title}"

    @property
    def name(self) -> str:
        return f"{self.direction.lower()} {self.number}"

    @property
    def link(self) -> str:
        return "#" + slug(self.heading)

    @property
    def made(self) -> list[str]:
        """The names that the network gives the results."""
        for _, step in self.network_steps:
            names = [name for name in step.statement.targets if name != "_" and not name.endswith("cache")]
            if names:
                return names
        return []


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def together(names: Sequence[str]) -> str:
    """blocks.0.attention.{query,key,value}.weight"""
    parts = [name.split(".") for name in names]
    return ".".join(same[0] if len(set(same)) == 1 else "{" + ",".join(same) + "}" for same in zip(*parts, strict=True))


class Listings:
    """The sections of a step. Remembers where numbers were printed, so that none is printed twice."""

    def __init__(self, traced: TracedStep, names: Names):
        self.traced = traced
        network, config = traced.network, traced.network.config
        self.numbers = Numbers(config, names)
        self.where: dict[tuple, tuple[str, str]] = {}  # a tensor's key -> its name, and the section that prints it
        self.printed: dict[str, tuple] = {}  # rows of numbers -> the key of the tensor that was printed so
        self.explained: set[str] = set()  # functions whose formula or derivation is printed already
        self.parameter_names: dict[tuple, str] = {}
        for flat in (network.flat_parameters, network.flat_gradients):
            entries = list(flat.views.items())
            for block in block_names(config):
                entries += [(together(names), flat.packed(names)) for names in packed_names(config, block).values()]
            self.parameter_names |= {(view.data_ptr(), view.numel()): name for name, view in entries}
        if config.position_kind != "learned":
            table = network.position_table
            self.parameter_names[table.data_ptr(), table.numel()] = FIXED
        self.sections: list[Section] = []
        self.stacks: list[str] = []  # of the forward sections, where there are two
        self._cut(traced.root)

    # The step, cut into sections

    def _cut(self, call: Call) -> None:
        """A section for each pair that the network's own functions call, in the order of time."""
        for step in call.steps:
            for inner in step.calls:
                if inner.path.parent.name != "ops":
                    self._cut(inner)
                elif inner.base != "dropout":  # it is off, and hands on what it gets
                    number = self._number(inner)
                    title, forward, backward = self._words(inner, abs(number))
                    self.sections.append(
                        Section(abs(number), inner, [(call, step)], title, backward if number < 0 else forward)
                    )
            own = any(inner.base != "dropout" for inner in step.calls)
            if self.sections and own and (call, step) not in self.sections[-1].network_steps:
                self.sections[-1].network_steps.append((call, step))

    def _number(self, call: Call) -> int:
        """Forward 1, 2, 3; backward -3, -2, -1: a backward has the number of its forward."""
        forwards = [section for section in self.sections if not section.call.backward]
        return len(self.sections) - 2 * len(forwards) if call.backward else len(forwards) + 1

    def _words(self, call: Call, number: int) -> tuple[str, str, str]:
        names = [self.parameter_name(value.tensor) for value in call.parameters.values()]
        first = re.sub(r"\{(\w+),[^}]*\}", r"\1", next((name for name in names if name and name != FIXED), ""))
        stack = first[: len("encoder.")] if first.startswith(("encoder.", "decoder.")) else ""
        first = re.sub(r"^(blocks\.\d+\.)?(source_)?", "", first.removeprefix(stack))
        config = self.traced.network.config
        if config.network != "encoder_decoder":
            return words_of(config.architecture, call.base, first, ALONE[config.network])
        if not call.backward:  # what names no stack belongs to that of the pair before
            read = sum(section.call.function == "token_embedding_forward" for section in self.sections)
            before = self.stacks[number - 2] if number > 1 else "encoder."
            if call.base == "token_embedding":
                before = "decoder." if read else "encoder."
            self.stacks.append(stack or before)
        of_stack = self.stacks[number - 1]
        title, forward, backward = words_of(config.architecture, call.base, first, of_stack)
        return f"{of_stack.rstrip('.').capitalize()}: {title[0].lower()}{title[1:]}", forward, backward

    def parameter_name(self, tensor: Tensor) -> str | None:
        return self.parameter_names.get((tensor.data_ptr(), tensor.numel()))

    # Where numbers are printed

    def _known(self, value: Value) -> tuple[str, str] | None:
        """The name under which these numbers are printed already, and the section that prints them."""
        if value.key not in self.where and value.copy.is_floating_point() and bool(value.numbers.any()):
            same = self.printed.get(self.numbers.fingerprint(value.numbers))
            if same is not None:
                return self.where[same]
        return self.where.get(value.key)

    def _remember(self, value: Value, name: str, section: Section) -> None:
        self.where[value.key] = (name, section.name)
        self.printed.setdefault(self.numbers.fingerprint(value.numbers), value.key)

    def _notes(
        self, notes: Iterable[tuple[Value, tuple[str, str]]], indent: str, section: Section, given: bool = False
    ) -> list[str]:
        """`# x = total of forward 9; mean, rstd of forward 9`: where numbers are printed that are not repeated.

        With autograd's judgement on those that are gradients, unless they are only `given` to a function.
        """
        names_of_note: dict[str, list[str]] = {}  # the text after the names -> the names
        within: dict[str, float] = {}
        for value, (name, place) in notes:
            there = name if not place else f"{name} {self._place(place, section)}"
            judged = value.difference is not None and not given
            same_name = place and name == value.name and not judged
            after = f" {self._place(place, section)}" if same_name else f" = {there}"
            names_of_note.setdefault(after, []).append(value.name)
            if value.difference is not None and judged:
                within[after] = max(within.get(after, 0.0), value.difference)
        lines = [f"{indent}# "]
        for after, names in names_of_note.items():
            autograd = f" (autograd, within {scientific(within[after])})" if after in within else ""
            part = ", ".join(dict.fromkeys(names)) + after + autograd
            if len(lines[-1]) + len(part) > WIDTH:
                lines.append(f"{indent}# ")
            lines[-1] += part if lines[-1].endswith("# ") else f"; {part}"
        return lines if names_of_note else []

    def _place(self, place: str, section: Section) -> str:
        return "above" if place == section.name else f"of {place}"

    # Code with its numbers

    def section(self, section: Section) -> list[str]:
        """The section: heading, text, derivations that the page has not shown yet, and the code with its numbers."""
        call = section.call
        caller, first = section.network_steps[0]
        lines = [f"### {section.heading}", "", section.about, ""]
        if call.backward:
            lines += self._derivations(call)
        lines += ["```python", f"# {caller.path.relative_to(PACKAGE)}, {caller.function}"]
        lines += [*first.statement.comment, *first.statement.source, ""]
        lines += self._listing(call, "", section)
        for network_call, step in section.network_steps:
            made = self._made(step.values, network_call, "", section, outside=True)
            if made and step is not first:
                lines += ["", f"# {network_call.path.relative_to(PACKAGE)}, {network_call.function}"]
                lines += [*step.statement.comment, *step.statement.source]
            lines += made
        return [*lines, "```", ""]

    def _derivations(self, call: Call) -> list[str]:
        lines: list[str] = []
        for inner in call.walk():
            if inner.pair is not None and inner.base != "dropout" and inner.base not in self.explained:
                self.explained.add(inner.base)
                lines += ["", f"{inner.base}:"] if lines else [f"{inner.base}:"]
                lines += [f"    {line}".rstrip() for line in inner.pair.docstring.splitlines()]
        return ["```text", *lines, "```", ""] if lines else []

    def _listing(self, call: Call, indent: str, section: Section, caller: Call | None = None) -> list[str]:
        """A function: its file and name, its arguments, then its statements with their numbers."""
        lines = [f"{indent}# {call.path.relative_to(PACKAGE)}, {call.function}"]
        if not call.backward and call.function not in self.explained:
            self.explained.add(call.function)
            formula = call.docstring.split("\n\n")[0].replace("\n", " ")
            together = f"{lines[0]}: {formula}"
            lines = [together] if len(together) <= WIDTH else [*lines, f"{indent}# {formula}"]
        lines += self._given(call, indent, section, caller)
        comment: list[str] = []
        for step in call.steps:
            comment += step.statement.comment
            shown = self._step(step, call, indent, section)
            if shown:
                lines += [f"{indent}{line}" for line in comment] + shown
                comment = []
        return lines

    def _given(self, call: Call, indent: str, section: Section, caller: Call | None) -> list[str]:
        """The arguments of a call, except those that the caller's lines show already, under the same name or above."""
        lines, notes = [], []
        there = {(value.name, value.key) for value in caller.values()} if caller else set()
        listed = {self.parameter_name(value.tensor) for value in section.call.parameters.values()} if caller else set()
        for value in call.parameters.values():
            parameter = self.parameter_name(value.tensor)
            known = self._known(value)
            if value.name in call.buffers or (value.name, value.key) in there or (parameter and parameter in listed):
                continue
            if known is None:
                self._remember(value, parameter or value.name, section)
                if parameter:
                    self.where[value.key] = (parameter, "")  # its name says where it is printed
                title = f"{value.name}{{shape}}" + (f" = {parameter}" if parameter else "")
                decimals = 1 if parameter and parameter != FIXED else 4
                lines += self.numbers.block(value, title, indent, parameter, decimals)
            elif known != (value.name, section.name):
                notes.append((value, known))
        return self._notes(notes, indent, section, given=True) + lines

    def _step(self, step: Step, call: Call, indent: str, section: Section) -> list[str]:
        """The lines of a statement, of what it calls, and of what it computes; empty if there is nothing to show."""
        statement = step.statement
        if hasattr(statement.node, "body") or any(line.startswith("record(") for line in statement.source):
            return []
        calls = [inner for inner in step.calls if inner.base != "dropout"]
        inside = [line for inner in calls for line in self._listing(inner, indent + "    ", section, call)]
        made = [] if call.backward else [f"{indent}# {name} = {decimal(n)}" for name, n in step.scalars.items()]
        made += self._made(step.values, call, indent, section)
        if isinstance(statement.node, ast.Return):
            outcome = call.outcome
            if outcome is not None and not (inside and outcome.key in self.where):
                outcome.name = outcome_name(statement.node, call)
                made += self._made([outcome], call, indent, section)
            if not inside and not made:
                return []
        return [f"{indent}{line}" for line in statement.source] + inside + made

    def _made(
        self, values: Sequence[Value], call: Call, indent: str, section: Section, outside: bool = False
    ) -> list[str]:
        """The values that a statement assigned: their numbers and autograd's, or where these stand already.

        `outside`: the statement is the network's, and later sections refer to its names.
        """
        lines, notes = [], []
        for value in values:
            parameter = self.parameter_name(value.tensor)
            if not value.meaningful or value.name == "_" or (parameter and value.added is None):
                continue  # a parameter is printed where it is given
            known = None if parameter else self._known(value)
            if known is None:
                lines += self._new(value, parameter, indent, call, section)
                continue
            name, place = known
            given = next((v.name for v in call.parameters.values() if v.key == value.key), None)
            if value is call.outcome and given is not None:
                known = name, place = given, ""
            alias = not outside and any(v.key == value.key and v.name != value.name for v in call.values())
            elsewhere = place != section.name and not alias and not outside
            gradient = value.difference is not None
            renamed = (name, place) != (value.name, section.name)
            if (gradient and (renamed or outside)) or (elsewhere and renamed):
                notes.append((value, known))
            if place == section.name and not alias and value is not call.outcome:
                self.where[value.key] = (value.name, place)
        if outside and all(value.name == known[0] for value, known in notes):
            notes = []  # the name is printed right above
        # of several names for one tensor, later sections use the first
        for value, known in reversed(notes):
            if known[1] == section.name:
                self.where[value.key] = (value.name, section.name)
        return lines + self._notes(notes, indent, section)

    def _new(self, value: Value, parameter: str | None, indent: str, call: Call, section: Section) -> list[str]:
        storage = value.tensor.untyped_storage().data_ptr()
        views = [
            v.name
            for step in call.steps
            for v in step.values
            if step.statement.writes_in_place and v.tensor.untyped_storage().data_ptr() == storage and v.added is None
        ]
        self._remember(value, value.name, section)
        if value.name not in views and len(set(views)) > 1:  # dqkv, of which dquery, dkey and dvalue are printed
            order = sorted(set(views), key=lambda name: [v.tensor.storage_offset() for v in call.bound(name)])
            within = f" (autograd, within {scientific(value.difference)})" if value.difference is not None else ""
            letters = self.numbers.letters(value.copy)
            return [f"{indent}# {value.name} {letters} = {', '.join(order)} side by side{within}"]
        title = f"{value.name}{{shape}}" + (", not yet complete" if value.part else "")
        return self.numbers.block(value, title, indent, parameter)


def outcome_name(node: ast.Return, call: Call) -> str:
    """`return context.transpose(...)` gives context another layout; `return x + weight` makes y, or dx."""
    returned: ast.expr | None = node.value
    if isinstance(returned, ast.Tuple):
        returned = returned.elts[0]
    while isinstance(returned, ast.Call | ast.Attribute):
        returned = returned.func if isinstance(returned, ast.Call) else returned.value
    if isinstance(returned, ast.Name) and returned.id in call.names() - set(call.parameters):
        return returned.id
    if call.pair is not None:
        return f"d{call.pair.passed[0]}"
    return call.base if "y" in call.names() else "y"
