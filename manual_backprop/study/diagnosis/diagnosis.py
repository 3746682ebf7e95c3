"""All checks for a config, ordered so that an earlier failure may explain a later one."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from ...data.tokens.corpus import Corpus
from ...data.tokens.order import Order
from ...models.implementations import build_network
from ...models.network import Network
from ...models.training_step import build_optimizer
from ...optim.optimizers import Optimizer
from ...tasks import LanguageModelTask, Task
from .finding import CAUSES, FOLLOWS, PASSED, Finding
from .loader import Loader
from .rates import RangeTest
from .rows import RowLoader
from .training import Training


class Diagnosis:
    """The diagnosis of a config and the examples of its task. It writes nothing; every check builds its own network."""

    def __init__(self, task: Task):
        self.task, self.config = task, task.config
        self.network_config = replace(task.network_config, label_smoothing=0.0)
        self.rate = self.config.peak_learning_rate
        self.range_test: RangeTest | None = None  # set when check 5 has run it
        self.failed: list[int] = []

    def fresh(self) -> tuple[Network, Optimizer]:
        network = build_network(self.config.implementation.name, self.network_config)
        return network, build_optimizer(self.config, network)

    def loader(self) -> Loader | RowLoader:
        """The loader with the run's data order, ignoring `training.overfit_batches`, which uses only a part of the
        data. For a text the same order can also be built over another corpus."""
        task = self.task
        if not isinstance(task, LanguageModelTask):
            return RowLoader(self.config, task.order(), self.network_config.n_outputs or self.network_config.vocab_size)

        def order(corpus: Corpus) -> Order:
            return LanguageModelTask(self.config, corpus, task.cache).order()

        return Loader(self.config, task.corpus, order)

    def findings(self) -> Iterator[Finding]:
        """Yields the findings one by one. Raises InputError if there are too few examples."""
        loader = self.loader()
        yield self._judged(loader.labels())
        device = torch.device(self.network_config.get_device())
        training = Training(self.config, self.fresh, self.task.order(), device)
        yield self._judged(training.initial_loss())
        yield self._judged(training.sane_gradients())
        yield self._judged(training.sane_updates(self.rate))
        self.range_test = training.rates()
        picked = self.range_test.picked or self.rate
        yield self._judged(training.one_batch(picked))
        yield self._judged(training.several_batches(picked))
        yield self._judged(loader.order_and_masks())

    def _judged(self, found: Finding) -> Finding:
        """The finding; a failure that an earlier failure explains gets the status FOLLOWS."""
        causes = [str(check) for check in CAUSES.get(found.check, ()) if check in self.failed]
        if found.status == PASSED:
            return found
        self.failed.append(found.check)
        if not causes:
            return found
        return replace(found, status=FOLLOWS, reason=f"{found.reason} (repair {causes[0]} first)")
