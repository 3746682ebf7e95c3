"""What a test draws without a generator of its own depends on its name alone (conftest.py)."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("case", ["first", "second"])
def test_numbers_are_those_of_the_name(case: str) -> None:
    """Whatever other tests ran before in this process."""
    seed = zlib.crc32(f"test_seeds.py::test_numbers_are_those_of_the_name[{case}]".encode())
    assert random.random() == random.Random(seed).random()
    assert np.random.random() == np.random.RandomState(seed).random()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
