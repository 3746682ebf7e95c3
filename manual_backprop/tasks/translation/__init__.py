"""task=translation: translate a source text into a target text, learned from pairs.

task      the task: its metrics, its generated texts, its files
rows      pairs as batches, without those that are too long for the network
scores    exact match and chrF
writer    inference: from sources to targets
"""

from __future__ import annotations

from .task import TranslationTask

__all__ = ["TranslationTask"]
