"""The result of a check."""

from dataclasses import dataclass

PASSED, FAILED, FOLLOWS = "passed", "FAILED", "follows"  # follows: it fails because an earlier check failed

CHECKS = {
    1: "the labels are right",
    2: "the initial loss is that of an untrained model",
    3: "every gradient is finite and of sane size",
    4: "every parameter changes, by a sane ratio",
    5: "one batch can be memorized",
    6: "the losses of several batches fall together",
    7: "batching, shuffling and masking",
}
CAUSES = {4: (3,), 5: (3, 4), 6: (3, 4, 5)}  # checks that cannot pass where one of these fails


@dataclass(frozen=True)
class Finding:
    """`reason` says what was measured and what it had to be, passed or not."""

    check: int
    status: str
    reason: str

    @property
    def title(self) -> str:
        return CHECKS[self.check]


def finding(check: int, wrong: str | None, right: str) -> Finding:
    """The finding of a check: failed with the reason `wrong`, or passed with the reason `right` if `wrong` is None."""
    return Finding(check, PASSED if wrong is None else FAILED, right if wrong is None else wrong)
