"""The page about one step: introduction, map, the sections forward and backward, the parameters' gradients, the update.

The sections are `listing.py`'s. What is computed here is only what a step does not do itself: the loss of nudged
parameters, and the loss after the update.
"""

import inspect
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ... import ops
from ...common.batch import Batch
from ...models.custom import CustomTransformer
from ...models.network import block_names, packed_names
from .autograd import TracedStep
from .listing import Listings, slug, together
from .numbers import LABEL, Names, decimal, scientific
from .words import ARCHITECTURES, TEXTS, filled

PERTURBATION = 1e-6


class Page:
    """`text()` is the page; `tensors` how many it prints, once it has been made. Of a network that says which token
    comes next; that of an encoder alone is `encoder_page`'s."""

    updated = "token_embedding.weight"  # the parameter whose update is printed
    outcome = "outcome"  # of words.toml, above what the network says with the new parameters

    def __init__(self, traced: TracedStep, names: Names, facts: Mapping[str, str], learning_rate: float, command: str):
        """`facts`: what the example says of itself, for the texts of words.toml."""
        self.traced, self.names = traced, names
        self.learning_rate, self.command = learning_rate, command
        self.listings = Listings(traced, names)
        self.twin = type(traced.network)(traced.network.config)  # for what is tried out
        repeated = next((word for word in names.read if names.read.count(word) > 1), "")
        self.facts = {
            "repeated_word": repeated,
            "repeated": f"`{repeated}` was read twice and gets two terms",
            "item": "word",
            **facts,
        }

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
            f"The loss is **{decimal(float(self.traced.loss))}**. {self._beside_the_loss()}",
            "",
            "## Backward",
            "",
            *backward,
            *self._parameters(),
            *self._update(),
        ]
        return filled("\n".join(lines), self.facts).rstrip() + "\n"

    # What is learned

    @property
    def targets(self) -> list[str]:
        return [self.names.vocabulary[token] for token in self.traced.batch.targets[0].tolist()]

    def _beside_the_loss(self) -> str:
        words = len(self.names.vocabulary)
        return f"Guessing among {words} words would cost log {words} = {decimal(math.log(words))}."

    def _introduction(self) -> list[str]:
        config, read, source = self.traced.network.config, self.names.read, self.names.source
        words, targets = self.names.vocabulary, self.targets
        facts = {
            "source": " ".join(source),
            "text": " ".join((*read, targets[-1])),
            "tokens": " ".join(read),
            "targets": " ".join(targets),
            "task": "\n".join(
                f"| {place} | {' '.join(read[: place + 1])} | **{target}** |" for place, target in enumerate(targets)
            ),
            "vocabulary": vocabulary(words, {*source, *read, *targets}),
            "sizes": f"| 1 text | {f'{len(source)} places of the source | ' if source else ''}{len(read)} places"
            f"{' of the target' if source else ''} | {config.d_model} numbers at each place "
            f"| {config.n_heads} heads | {config.d_head} numbers in a head | {config.d_ffn} hidden units "
            f"| {len(words)} words | B T = {len(read)} places in all |",
        }
        return self._introducing("introduction_of_pairs" if source else "introduction", facts)

    def _introducing(self, text: str, facts: Mapping[str, str]) -> list[str]:
        """A text of words.toml, then how to read the page, with these facts and those that every introduction has."""
        network = self.traced.network
        known = {
            "command": self.command,
            "architecture": ARCHITECTURES[network.config.architecture],
            "count": str(network.count_parameters()),
            "last": str(max(section.number for section in self.listings.sections)),
        }
        return filled(f"{TEXTS[text]}\n{TEXTS['how_to_read']}", known | dict(facts)).splitlines()

    def _map(self) -> list[str]:
        """One row for each pair of sections: the table of contents."""
        sections = self.listings.sections
        backward = {section.number: section for section in sections if section.call.backward}
        lines = [
            "",
            "## The map",
            "",
            "| | ↓ forward | makes | ↑ backward | makes | within |",
            "|---|---|---|---|---|---|",
        ]
        for section in (section for section in sections if not section.call.backward):
            back = backward[section.number]
            compared = [value.difference for call in back.call.walk() for value in call.gradients]
            worst = max((difference for difference in compared if difference is not None), default=0.0)
            made, dmade = (", ".join(f"`{name}`" for name in s.made) or "`dweight`" for s in (section, back))
            lines.append(
                f"| {section.number} | [{section.title}]({section.link}) | {made} "
                f"| [Backward {section.number}]({back.link}) | {dmade} | {scientific(worst)} |"
            )
        ends = ("The parameters' gradients", "The update")
        calling = [call for call in self.traced.root.walk() if call.path.parent.name != "ops"]
        files = sorted({call.path.name for call in calling[1:]})
        lines += ["", "Then " + ", and ".join(f"[{title.lower()}](#{slug(title)})" for title in ends) + ".", ""]
        lines += [
            "Dropout is off: `dropout_forward` and `dropout_backward` hand on what they get, and are not shown. The "
            f"functions of {' and '.join(f'`models/{file}`' for file in files)} that only call others ("
            + ", ".join(f"`{name}`" for name in dict.fromkeys(call.function for call in calling))
            + ") show through their lines above each listing.",
            "",
        ]
        return lines

    # The parameters

    def _loss(self) -> float:
        smoothing = self.traced.network.config.label_smoothing
        return float(ops.cross_entropy_forward(self._outputs(), self.traced.batch.targets, None, smoothing)[0])

    def _outputs(self) -> Tensor:
        """The outputs of the copy's head: logits, or numbers."""
        batch = self.traced.batch
        return self.twin.predict(batch.tokens if isinstance(batch, Batch) else batch)

    def _finite_difference(self, name: str, index: tuple[int, ...]) -> float:
        """dloss / d(one number of one parameter), without any calculus."""
        parameter = self.twin.parameters[name]
        losses = []
        for perturbation in (PERTURBATION, -PERTURBATION):
            self.twin.load_parameters(self.traced.network.parameters)
            parameter[index] += perturbation
            losses.append(self._loss())
        return (losses[0] - losses[1]) / (2 * PERTURBATION)

    def _parameters(self) -> list[str]:
        head = (
            "| parameter | shape | complete after | length | largest element | by hand | autograd | nudged | within |"
        )
        lines = [*TEXTS["parameters"].splitlines(), "", head, "|---|---|---|--:|---|--:|--:|--:|--:|"]
        for name, gradient in self.traced.network.gradients.items():
            autograd = self.traced.autograd_gradients[name]
            # rounded first: among elements that are equal but for rounding, the first on every machine
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
            lines += [*TEXTS["tied_in_pairs" if self.names.source else "tied"].splitlines(), "", *self._tied(), ""]
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
        """The embedding table's gradient: from scoring, from reading, and their sum."""
        uses = {"linear_cross_entropy_backward": "as head", "token_embedding_backward": "as table"}
        parts = [
            (f"{uses[section.call.function]} (backward {section.number})", section.call.parameters["dweight"].numbers)
            for section in self.listings.sections
            if section.call.function in uses
        ]
        total = ("sum", self.traced.network.gradients["token_embedding.weight"])
        return self._beside([*parts, total])

    def _beside(self, parts: list[tuple[str, Tensor]]) -> list[str]:
        """Tensors of one shape, side by side."""
        labels = self.listings.numbers.labels(parts[0][1])
        columns = [self.listings.numbers.rows(tensor) for _, tensor in parts]
        width = len(columns[0][0])
        lines = ["```text", " " * LABEL + "   ".join(title.rjust(width) for title, _ in parts)]
        for word, *rows in zip(labels, *columns, strict=True):
            lines.append(f"{word:<{LABEL}}" + "   ".join(rows))
        return [*lines, "```"]

    # The update

    def _said(self) -> list[float]:
        """The probability of each target, computed by the twin."""
        return self._outputs()[0].softmax(-1).gather(1, self.traced.batch.targets[0][:, None])[:, 0].tolist()

    def _said_before_and_after(self, before: list[float], after: list[float]) -> list[str]:
        lines = ["| it has read | it should say | probability before | after |", "|---|---|--:|--:|"]
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            read = " ".join(self.names.read[: place + 1])
            lines.append(f"| {read} | **{self.targets[place]}** | {decimal(old)} | {decimal(new)} |")
        return lines

    def _after(self, learning_rate: float) -> float:
        """The loss after one update; the twin keeps the new parameters."""
        network = self.traced.network
        self.twin.load_parameters(network.parameters)
        self.twin.flat_gradients.buffer.copy_(network.flat_gradients.buffer)
        self.twin.update_parameters(learning_rate)
        return self._loss()

    def _update(self) -> list[str]:
        network, name = self.traced.network, self.updated
        self.twin.load_parameters(network.parameters)
        loss, said = self._loss(), self._said()
        small_rate = self.learning_rate / 10
        small = self._after(small_rate)
        after = self._after(self.learning_rate)
        statement = inspect.getsource(CustomTransformer.update_parameters).splitlines()[-1].strip()
        place = f"# models/network.py, update_parameters: learning_rate = {self.learning_rate}"
        lines = [*TEXTS["update"].splitlines(), "", "```python", place, statement, "```", "", f"For `{name}`:", ""]
        parts = (("before", network.parameters), ("gradient", network.gradients), ("after", self.twin.parameters))
        lines += self._beside([(title, tensors[name]) for title, tensors in parts])
        lines += ["", *TEXTS[self.outcome].splitlines(), "", *self._said_before_and_after(said, self._said())]
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


def vocabulary(words: Sequence[str], used: Collection[str]) -> str:
    """The sentence that lists all words, and says which of them do not occur."""
    never = [f"`{word}`" for word in words if word not in used]
    listed = ", ".join(f"`{word}`" for word in words)
    return f"{listed}; {' and '.join(never)} do{'es' * (len(never) == 1)} not occur"
