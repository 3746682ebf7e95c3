"""docs/api.md: what `from manual_backprop import ...` gives, and the pairs of `ops`, written from their docstrings.

The sources are read as text: nothing is imported, and the page is the same on every machine. `page` is what
`python -m manual_backprop.tools.api_page` writes; `examples` are what the tests run.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import HOMES

PACKAGE = Path(__file__).resolve().parent.parent
SECTIONS = {  # of what the package exports
    "Models": ("CustomTransformerWrapper", "EncoderDecoderWrapper", "EncoderWrapper", "CustomTransformerConfig"),
    "Networks": ("CustomTransformer", "TorchTransformer", "BaselineTransformer"),
    "Beside a training loop": ("Evaluator", "TrainingLogger", "load_training_log", "CheckpointManager"),
    "Data": (
        *("analyze_dataset", "train_tokenizer", "train_tokenizer_from_files"),
        *("pretokenize_dataset", "load_pretokenized"),
    ),
    "Parts of your own": ("register_task", "register_objective", "register_activation"),
}
TYPES = (  # what these take and return, which is not exported itself
    *("common.batch.Batch", "common.batch.PairBatch", "common.batch.EncoderBatch"),
    *("tasks.evaluation.Evaluation", "tracking.training_log.TrainingLog", "tracking.training_log.Series"),
    "checkpoints.checkpoint.Checkpoint",
    *("data.datasets.analysis_text.Report", "data.datasets.analysis_text.Recommendations"),
    "data.tokens.token_shards.TokenShards",
)
MACHINERY = ("models.step", "models.mirror_step")  # methods that only the networks themselves call
OPS = (  # in the order in which a network uses them
    *("embedding", "normalization", "linear", "softmax", "dropout", "attention", "visible", "activations"),
    *("feed_forward", "loss", "rms_normalization", "rotary_attention", "gated_feed_forward", "pooling"),
)
FORWARD, BACKWARD = "_forward", "_backward"
WIDTH = 100  # of a signature in one line
SET_UP = """\
>>> import torch
>>> from pathlib import Path
>>> from manual_backprop import *
>>> from manual_backprop.ops import *
"""
HEAD = """\
# The API

`from manual_backprop import ...` gives the models and what goes with them, `manual_backprop.ops` the forward and
backward pairs. `python -m manual_backprop.tools.api_page` writes this page from the docstrings; the tests run every
example, after these lines:

```pycon
{set_up}```

Letters: B batch, T sequence length, S source length, D `d_model`, H `n_heads`, G heads of keys and values, K head
dimension, F `d_ffn`, V `vocab_size`, L `n_blocks`, N = B*T tokens, I and O inputs and outputs. `(..., D)` is any shape
that ends with D. The gradient of `x` is `dx`, with its shape. Losses are in nats, lengths in tokens. `Rows` is a tensor
(B, T) or a list of lists.

Errors are in `manual_backprop.common.errors`, and each says what was given, what was expected and what to do:
InputError, a ValueError; ConfigError and CheckpointError, which are InputErrors; StorageError, where the disk refuses.

{contents}
"""


@dataclass(frozen=True)
class Definition:
    """The definition of a name: its module, and its node in the syntax tree."""

    module: str  # within the package: models.custom
    node: ast.FunctionDef | ast.ClassDef | ast.Assign

    @property
    def name(self) -> str:
        return ast.unparse(self.node.targets[0]) if isinstance(self.node, ast.Assign) else self.node.name

    @property
    def docstring(self) -> str:
        """Empty if there is none."""
        return "" if isinstance(self.node, ast.Assign) else ast.get_docstring(self.node) or ""

    @property
    def level(self) -> str:
        """Of its heading."""
        return "####" if self.module.startswith("ops.") else "###"

    def source_of(self, node: ast.stmt) -> str:
        """The lines of a statement of its module."""
        lines = file_of(self.module).read_text(encoding="utf-8").splitlines()
        return "\n".join(lines[node.lineno - 1 : node.end_lineno])


def file_of(module: str) -> Path:
    place = PACKAGE.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def find(module: str, name: str) -> Definition | None:
    """The definition of a name that a module of the package has, its own or imported; None: it is of elsewhere."""
    for node in parsed(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign) and Definition(module, node).name == name:
            return Definition(module, node)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and (source := imported_module(module, node)) is not None:
                    return find(source, alias.name)
    return None


def imported_module(module: str, node: ast.ImportFrom) -> str | None:
    """The module of the package that an import in `module` reads; None if it reads another package."""
    absolute, _, below = (node.module or "").partition(".")
    if node.level == 0:
        return below if absolute == PACKAGE.name else None
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (file_of(module).name == "__init__.py")]
    return ".".join([*parts, node.module] if node.module else parts)


def exported(name: str) -> Definition:
    """The definition of a name that the package exports. Raises LookupError if nothing defines it."""
    if (found := find(HOMES[name], name)) is None:
        raise LookupError(f"manual_backprop.{HOMES[name]} does not define {name}")
    return found


def ops() -> dict[str, list[Definition]]:
    """The definitions that `ops` exports, by module, in the order of the source."""
    names: dict[str, set[str]] = {}
    for node in parsed("ops").body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None:
            names[node.module] = {alias.name for alias in node.names}
    found: dict[str, list[Definition]] = {}
    for module in OPS:
        definitions = {name: find(f"ops.{module}", name) for name in names.pop(module)}
        found[module] = sorted((one for one in definitions.values() if one), key=lambda one: one.node.lineno)
    if names:
        raise LookupError(f"ops exports {', '.join(names)}, which this page does not place: see OPS")
    return found


def public() -> list[Definition]:
    """The definitions of all exported names."""
    exports = [exported(name) for names in SECTIONS.values() for name in names]
    return exports + [definition for definitions in ops().values() for definition in definitions]


def examples() -> Iterator[Definition]:
    """The exported definitions that have an example in their docstring."""
    return (definition for definition in public() if ">>> " in definition.docstring)


# The page


def page() -> str:
    shown: dict[str, str] = {}  # a class that has methods -> the name under which they are listed
    parts = []
    for title, names in SECTIONS.items():
        parts += [f"## {title}", *(entry(exported(name), shown) for name in names)]
    parts.append("## What they take and return")
    for place in TYPES:
        module, _, name = place.rpartition(".")
        definition = find(module, name)
        assert definition is not None, place
        parts.append(entry(definition, shown))
    about = (ast.get_docstring(parsed("ops")) or "").partition("\nMay import")[0]
    parts += ["## Pairs", markdown(about)]
    for module, definitions in ops().items():
        parts += [f"### ops.{module}", markdown(ast.get_docstring(parsed(f"ops.{module}")) or "")]
        constants = [one.source_of(one.node) for one in definitions if isinstance(one.node, ast.Assign)]
        parts += [fenced("py", "\n".join(constants))] * bool(constants)
        for one in definitions:
            if not isinstance(one.node, ast.Assign) and not one.name.endswith(BACKWARD):
                backward = find(one.module, one.name.removesuffix(FORWARD) + BACKWARD)
                parts.append(entry(one, shown, backward if one.name.endswith(FORWARD) else None))
    headings = [part.removeprefix("## ") for part in parts if part.startswith("## ")]
    contents = " · ".join(f"[{title}](#{title.lower().replace(' ', '-')})" for title in headings)
    return HEAD.format(set_up=SET_UP, contents=contents) + "\n" + "\n\n".join(parts) + "\n"


def entry(one: Definition, shown: dict[str, str], backward: Definition | None = None) -> str:
    """A name with its signature, its docstring and, of a class, its methods; a forward together with its backward."""
    if isinstance(one.node, ast.ClassDef):
        return class_entry(one, shown)
    text, example = split(one.docstring)
    both = [one] if backward is None else [one, backward]
    parts = [f"{one.level} {', '.join(half.name for half in both)}", fenced("py", "\n\n".join(map(signature, both)))]
    parts += [markdown(docstring) for docstring in (text, *(half.docstring for half in both[1:]))]
    return "\n\n".join([*parts, *[markdown(example)] * bool(example)])


def class_entry(one: Definition, shown: dict[str, str]) -> str:
    assert isinstance(one.node, ast.ClassDef)
    methods = {name: method for name, method in methods_of(one).items() if method.module not in MACHINERY}
    parts = [f"{one.level} {one.name}"]
    if f"{one.module}.{one.name}" in TYPES:
        parts.append(f"In `manual_backprop.{one.module}`.")
    if "__init__" in methods:
        parts.append(fenced("py", signature(methods["__init__"], name=one.name)))
    elif fields := fields_of(one):
        parts.append(fenced("py", f"class {one.name}:\n{fields}"))
    text, example = split(one.docstring)
    made = methods["__init__"].docstring if "__init__" in methods else ""
    parts += [markdown(each) for each in (text, made, example) if each]
    elsewhere: dict[str, list[str]] = {}
    for name, method in methods.items():
        owner = f"{method.module}.{owner_of(method)}"
        if shown.setdefault(owner, one.name) != one.name:
            elsewhere.setdefault(shown[owner], []).append(f"`{name}`")
        elif not name.startswith("_"):
            parts.append(f"**{one.name}.{name}**\n\n{fenced('py', signature(method))}\n\n{markdown(method.docstring)}")
    parts += [f"As of `{other}`: {', '.join(names)}." for other, names in elsewhere.items()]
    return "\n\n".join(parts)


def owner_of(method: Definition) -> str:
    """The class in whose body it is written."""
    (owner,) = (
        node.name for node in parsed(method.module).body if isinstance(node, ast.ClassDef) and method.node in node.body
    )
    return owner


def methods_of(one: Definition) -> dict[str, Definition]:
    """The methods of a class: __init__, its public methods and properties, then those of its base classes. A method
    without a docstring gets that of the method it overrides."""
    assert isinstance(one.node, ast.ClassDef)
    own = [node for node in one.node.body if isinstance(node, ast.FunctionDef)]
    found = {node.name: Definition(one.module, node) for node in own}
    found = {name: method for name, method in found.items() if name == "__init__" or not name.startswith("_")}
    for base in one.node.bases:
        above = find(one.module, ast.unparse(base))
        if above is not None and isinstance(above.node, ast.ClassDef):
            for name, method in methods_of(above).items():
                if name not in found or (name != "__init__" and not found[name].docstring):
                    found[name] = method
    return found


def fields_of(one: Definition) -> str:
    """The fields of a dataclass or a NamedTuple, as in the source."""
    assert isinstance(one.node, ast.ClassDef)
    return "\n".join(one.source_of(node) for node in one.node.body if isinstance(node, ast.AnnAssign))


def signature(one: Definition, name: str | None = None) -> str:
    """The signature as in the source, without self; a default that is a constant is shown by its value. `name`: the
    class whose __init__ this is."""
    node = one.node
    assert isinstance(node, ast.FunctionDef)
    if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
        return f"{node.name}: {ast.unparse(node.returns) if node.returns else 'Any'}"
    given = parameters(node.args, one.module)
    result = "" if node.returns is None or name is not None else f" -> {ast.unparse(node.returns)}"
    line = f"{name or node.name}({', '.join(given)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name or node.name}(\n" + "".join(f"    {one},\n" for one in given) + f"){result}"


def parameters(arguments: ast.arguments, module: str) -> list[str]:
    def shown(argument: ast.arg, default: ast.expr | None = None) -> str:
        text = ast.unparse(argument)
        if default is None:
            return text
        value = value_of(default, module)
        written = ast.unparse(value)
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            written = f'"{value.value}"'  # in the quotes of the sources
        return f"{text}{' = ' if argument.annotation else '='}{written}"

    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + [*arguments.defaults]
    found = [shown(*pair) for pair in zip(plain, defaults, strict=True) if pair[0].arg not in ("self", "cls")]
    if arguments.vararg is not None:
        found.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        found.append("*")
    found += [shown(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return found + ([] if arguments.kwarg is None else [f"**{ast.unparse(arguments.kwarg)}"])


def value_of(default: ast.expr, module: str) -> ast.expr:
    """A constant's value in place of its name."""
    if isinstance(default, ast.Name) and (constant := find(module, default.id)) is not None:
        node = constant.node
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Tuple):
            return node.value
    return default


def split(docstring: str) -> tuple[str, str]:
    """The docstring's text before the first example, and the rest."""
    text, mark, example = docstring.partition(">>> ")
    return text.rstrip(), mark + example


def markdown(docstring: str) -> str:
    """A docstring as Markdown: what is indented, and examples, in blocks; lines of a paragraph or an item joined."""
    parts = []
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        kind, lines = "", list[str]()
        if paragraph.startswith("- "):
            items = re.split(r"\n(?=- )", paragraph)
            parts.append("\n".join(block("", item.splitlines()) for item in items))
            continue
        for line in paragraph.splitlines():
            new = "pycon" if kind == "pycon" or line.startswith(">>> ") else "text" if line.startswith("    ") else ""
            if new != kind and lines:
                parts.append(block(kind, lines))
                lines = []
            kind, lines = new, [*lines, line]
        parts.append(block(kind, lines))
    return "\n\n".join(part for part in parts if part)


def block(kind: str, lines: list[str]) -> str:
    if kind:
        return fenced(kind, inspect.cleandoc("\n".join(["", *lines])))
    return re.sub(r"\s+", " ", " ".join(lines)).strip()


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
