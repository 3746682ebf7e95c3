"""The page about one step: introduction, map, the sections forward and backward, the parameters' gradients, the update.

`listing.py` writes the sections. This file computes only what is not part of a step: the loss of nudged parameters, and
the loss after the update.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...common.batch import PairBatch
from ...models.custom import CustomTransformer
from ...models.network import block_names, packed_names
from .autograd import TracedStep
from .listing import Listings, slug, source_of, together
from .numbers import LABEL, decimal, scientific
from .words import ARCHITECTURES, TEXTS, filled

PERTURBATION = 1e-6


class Page:
    """The page: `text()` returns it; afterwards `tensors` is the number of printed tensors."""

    def __init__(self, traced: TracedStep, words: Sequence[str], learning_rate: float, command: str):
        """`words`: the vocabulary."""
        self.traced, self.words = traced, words
        self.learning_rate, self.command = learning_rate, command
        self.listings = Listings(traced, words)
        self.twin = type(traced.network)(traced.network.config)  # a copy for nudged and updated parameters
        self.read, self.targets = (
            [words[token] for token in ids[0].tolist()] for ids in (traced.batch.tokens, traced.batch.targets)
        )
        self.source = [words[token] for token in source_of(traced.batch)]
        self.repeated = next(word for word in self.read if self.read.count(word) > 1)

    @property
    def tensors(self) -> int:
        return self.listings.numbers.tensors

    def text(self) -> str:
        sections = self.listings.sections
        forward = [line for section in sections if not section.call.backward for line in self.listings.section(section)]
        backward = [line for section in sections if section.call.backward for line in self.listings.section(section)]
        lines = [
            *self._introduction(),
            *self._map(),
            "## Forward",
            "",
            *forward,
            f"The loss is **{decimal(float(self.traced.loss))}**. Guessing among {len(self.words)} words would cost "
            f"log {len(self.words)} = {decimal(torch.tensor(len(self.words)).double().log().item())}.",
            "",
            "## Backward",
            "",
            *backward,
            *self._parameters(),
            *self._update(),
        ]
        facts = {"repeated_word": self.repeated, "repeated": f"`{self.repeated}` was read twice and gets two terms"}
        return filled("\n".join(lines), facts).rstrip() + "\n"

    def _introduction(self) -> list[str]:
        config, read, source = self.traced.network.config, self.read, self.source
        sections = self.listings.sections
        never = " and ".join(f"`{word}`" for word in self.words if word not in (*source, *read, *self.targets))
        facts = {
            "command": self.command,
            "source": " ".join(source),
            "text": " ".join((*read, self.targets[-1])),
            "tokens": " ".join(read),
            "targets": " ".join(self.targets),
            "task": "\n".join(
                f"| {place} | {' '.join(read[: place + 1])} | **{target}** |"
                for place, target in enumerate(self.targets)
            ),
            "vocabulary": ", ".join(f"`{word}`" for word in self.words) + f"; {never} do not occur",
            "architecture": ARCHITECTURES[config.architecture],
            "count": str(self.traced.network.count_parameters()),
            "last": str(max(section.number for section in sections)),
            "sizes": f"| 1 text | {f'{len(source)} positions of the source | ' if source else ''}{len(read)} positions"
            f"{' of the target' if source else ''} | {config.d_model} numbers at each position "
            f"| {config.n_heads} heads | {config.d_head} numbers in a head | {config.d_ffn} hidden units "
            f"| {len(self.words)} words | B T = {len(read)} positions in all |",
        }
        return filled(TEXTS["introduction_of_pairs" if source else "introduction"], facts).splitlines()

    def _map(self) -> list[str]:
        """The table of contents, with one row for each pair of sections."""
        sections = self.listings.sections
        backward = {section.number: section for section in sections if section.call.backward}
        lines = [
            "",
            "## The map",
            "",
            "| | ↓ forward | makes | ↑ backward | makes | within |",
            "|---|---|---|---|---|---|",
        ]
        for section in sections:
            if section.call.backward:
                continue
            back = backward[section.number]
            compared = [value.difference for call in back.call.walk() for value in call.gradients]
            worst = max((difference for difference in compared if difference is not None), default=0.0)
            made, dmade = (", ".join(f"`{name}`" for name in s.made) or "`dweight`" for s in (section, back))
            lines.append(
                f"| {section.number} | [{section.title}]({section.link}) | {made} "
                f"| [Backward {section.number}]({back.link}) | {dmade} | {scientific(worst)} |"
            )
        ends = ("The parameters' gradients", "The update")
        lines += ["", "Then " + ", and ".join(f"[{title.lower()}](#{slug(title)})" for title in ends) + ".", ""]
        lines += [
            "Dropout is off: `dropout_forward` and `dropout_backward` return their input, and are not shown. The "
            "functions of `models/custom.py` that only call others ("
            + ", ".join(f"`{name}`" for name in self._network_functions())
            + ") show through their lines above each listing.",
            "",
        ]
        return lines

    def _network_functions(self) -> list[str]:
        return list(dict.fromkeys(c.function for c in self.traced.root.walk() if c.path.parent.name != "ops"))

    # The parameters

    def _loss(self) -> float:
        smoothing = self.traced.network.config.label_smoothing
        return float(ops.cross_entropy_forward(self._logits(), self.traced.batch.targets, None, smoothing)[0])

    def _logits(self) -> Tensor:
        batch = self.traced.batch
        return self.twin.predict(batch if isinstance(batch, PairBatch) else batch.tokens)

    def _finite_difference(self, name: str, index: tuple[int, ...]) -> float:
        """dloss / d(one number of one parameter), by central differences."""
        parameter = self.twin.parameters[name]
        losses = []
        for perturbation in (PERTURBATION, -PERTURBATION):
            self.twin.load_parameters(self.traced.network.parameters)
            parameter[index] += perturbation
            losses.append(self._loss())
        return (losses[0] - losses[1]) / (2 * PERTURBATION)

    def _parameters(self) -> list[str]:
        lines = TEXTS["parameters"].splitlines()
        lines += [
            "",
            "| parameter | shape | complete after | length | largest element | by hand | autograd | nudged | within |",
        ]
        lines += ["|---|---|---|--:|---|--:|--:|--:|--:|"]
        for name, gradient in self.traced.network.gradients.items():
            autograd = self.traced.autograd_gradients[name]
            # rounded first, so that among nearly equal elements every machine takes the first
            place = int((gradient.abs() * 1e6).round().argmax())
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), gradient.shape))
            shape = self.listings.numbers.letters(gradient, places=True)
            numbers = (float(gradient[index]), float(autograd[index]), self._finite_difference(name, index))
            written = " | ".join(decimal(number) for number in numbers)
            within = scientific(float((gradient - autograd).abs().max()))
            lines.append(
                f"| `{name}` | {shape} | {self._source(name)} | {decimal(float(gradient.norm()))} "
                f"| {list(index)} | {written} | {within} |"
            )
        biases = self.traced.network.config.traits.biases
        lines += ["", *(TEXTS["zero_by_structure"] if biases else TEXTS["no_biases"]).splitlines(), ""]
        if self.traced.network.config.tied_head:
            lines += [*TEXTS["tied_in_pairs" if self.source else "tied"].splitlines(), "", *self._tied(), ""]
        return lines

    def _source(self, name: str) -> str:
        """The section that completes a parameter's gradient, as a link."""
        config = self.traced.network.config
        packed_with = [names for block in block_names(config) for names in packed_names(config, block).values()]
        known_as = {name, *(together(names) for names in packed_with if name in names)}
        for section in reversed(self.listings.sections):
            call = section.call
            names = [self.listings.parameter_name(call.parameters[buffer].tensor) for buffer in call.buffers]
            if known_as.intersection(names):
                return f"[{section.name}]({section.link})"
        raise AssertionError(f"no section adds to the gradient of {name}")

    def _tied(self) -> list[str]:
        """The embedding table's gradient: the parts from scoring and from reading, and their sum."""
        uses = {"linear_cross_entropy_backward": "as head", "token_embedding_backward": "as table"}
        parts = [
            (f"{uses[section.call.function]} (backward {section.number})", section.call.parameters["dweight"].numbers)
            for section in self.listings.sections
            if section.call.function in uses
        ]
        total = ("sum", self.traced.network.gradients["token_embedding.weight"])
        return self._beside([*parts, total])

    def _beside(self, parts: list[tuple[str, Tensor]]) -> list[str]:
        """Tensors of the vocabulary's shape, side by side."""
        columns = [self.listings.numbers.rows(tensor) for _, tensor in parts]
        width = len(columns[0][0])
        lines = ["```text", " " * LABEL + "   ".join(title.rjust(width) for title, _ in parts)]
        for word, *rows in zip(self.words, *columns, strict=True):
            lines.append(f"{word:<{LABEL}}" + "   ".join(rows))
        return [*lines, "```"]

    # The update

    def _probabilities(self) -> list[float]:
        """The probability of each target."""
        logits = self._logits()[0]
        return logits.softmax(-1).gather(1, self.traced.batch.targets[0][:, None])[:, 0].tolist()

    def _after(self, learning_rate: float) -> float:
        """The loss after one update; the copy keeps the new parameters."""
        network = self.traced.network
        self.twin.load_parameters(network.parameters)
        self.twin.flat_gradients.buffer.copy_(network.flat_gradients.buffer)
        self.twin.update_parameters(learning_rate)
        return self._loss()

    def _update(self) -> list[str]:
        network = self.traced.network
        name = "token_embedding.weight"
        self.twin.load_parameters(network.parameters)
        loss, probabilities = self._loss(), self._probabilities()
        small_rate = self.learning_rate / 10
        small = self._after(small_rate)
        after = self._after(self.learning_rate)
        statement = inspect.getsource(CustomTransformer.update_parameters).splitlines()[-1].strip()
        lines = [
            *TEXTS["update"].splitlines(),
            "",
            "```python",
            f"# models/network.py, update_parameters: learning_rate = {self.learning_rate}",
        ]
        lines += [statement, "```", "", f"For `{name}`:", ""]
        lines += self._beside(
            [
                ("before", network.parameters[name]),
                ("gradient", network.gradients[name]),
                ("after", self.twin.parameters[name]),
            ]
        )
        lines += [
            "",
            *TEXTS["outcome"].splitlines(),
            "",
            "| it has read | it should predict | probability before | after |",
            "|---|---|--:|--:|",
        ]
        for place, (old, new) in enumerate(zip(probabilities, self._probabilities(), strict=True)):
            read = " ".join(self.read[: place + 1])
            lines.append(f"| {read} | **{self.targets[place]}** | {decimal(old)} | {decimal(new)} |")
        square = float(network.flat_gradients.buffer.square().sum())
        facts = {
            "before": decimal(loss),
            "after": decimal(after),
            "fell": decimal(loss - after),
            "learning_rate": str(self.learning_rate),
            "square": decimal(square),
            "promised": decimal(self.learning_rate * square),
            "small_rate": str(small_rate),
            "small_fell": decimal(loss - small, 6),
            "small_promised": decimal(small_rate * square, 6),
        }
        return [*lines, "", *filled(TEXTS["promise"], facts).splitlines()]
