"""The proof: every hand-written gradient against autograd, central differences and what must be zero. Torch only.

`measure.py` the error and its bars; `op_table.py` one row an op, `op_mirrors.py` the ops in plain torch, `op_case.py`
what they are tried on, `op_check.py` a pair; `network_check.py` a network, `network_case.py` what it is tried on;
`low_precision.py` fp32 and bf16. `verification.py` is all of it, which `manual_backprop.verify` prints and
`tests/ops/test_gradients.py` asserts.
"""

# ruff: noqa: F401  the names are exported
from .low_precision import ENOUGH_TO_ROUND, check_network_precision, check_op_precision
from .measure import Finding, worst
from .network_case import ODD, draw_batch, odd_cases, odd_encoders, odd_pairs
from .network_check import check_network
from .op_case import Draw
from .op_check import check_op, check_ops
from .op_table import ROWS, cases_of
