"""The proof: checks every hand-written gradient against autograd, central differences and known zeros. Torch only.

`measure.py` defines the error and its bars. `op_table.py` has a row for each op, `op_mirrors.py` the ops in plain
torch, `op_case.py` their test inputs, `op_check.py` the check of a pair. `network_check.py` checks a network,
`network_case.py` has its test cases, `low_precision.py` checks fp32 and bf16. `verification.py` runs all of it:
`manual_backprop.verify` prints the result, and `tests/ops/test_gradients.py` asserts it.
"""

# ruff: noqa: F401  the names are exported
from .low_precision import ENOUGH_TO_ROUND, check_network_precision, check_op_precision
from .measure import Finding, worst
from .network_case import ODD, draw_batch, odd_cases, odd_encoders, odd_pairs
from .network_check import check_network
from .op_case import Draw
from .op_check import check_op, check_ops
from .op_table import ROWS, cases_of
