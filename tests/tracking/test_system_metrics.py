"""What the machine does, under MLflow's own names."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from manual_backprop.tracking import SystemMetrics, system_metrics

USED = "system/process_memory_usage_megabytes"


@pytest.fixture(autouse=True)
def interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "INTERVAL", 0.2)


def test_names_and_values() -> None:
    system = SystemMetrics()
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:  # something to be seen
        pass
    sample = system.sample()
    assert set(sample) == {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
        "system/process_memory_usage_megabytes",
    }
    assert 0 < sample["system/cpu_utilization_percentage"] <= 100
    own = psutil.Process(os.getpid()).memory_info().rss / 1e6
    assert 0.5 * own < sample["system/process_memory_usage_megabytes"] < 2 * own
    assert sample["system/process_memory_usage_megabytes"] < sample["system/system_memory_usage_megabytes"]
    assert 0 < sample["system/system_memory_usage_percentage"] < 100


def test_at_most_one_sample_an_interval() -> None:
    system = SystemMetrics()
    assert USED in system.sample()
    assert system.sample() == {}
    time.sleep(0.25)
    assert USED in system.sample()


def test_a_gpu_that_is_asked_for_and_not_there_costs_nothing() -> None:
    assert USED in SystemMetrics(gpu=True).sample()
