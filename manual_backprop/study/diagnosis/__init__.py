"""Diagnoses why a loss does not fall: seven checks, from the data to the training, and a learning-rate range test.

    loader.py       the data: labels (1); batching, shuffling and masking (7)
    training.py     the network and its optimizer: initial loss (2), gradients (3), updates (4), learning (5, 6)
    rates.py        the learning-rate range test, and its picture
    diagnosis.py    all of them for a config

`python -m manual_backprop.diagnose` prints what they find.
"""

from .diagnosis import Diagnosis
from .finding import FAILED, FOLLOWS, PASSED, Finding

__all__ = ["FAILED", "FOLLOWS", "PASSED", "Diagnosis", "Finding"]
