"""task=translation: what becomes of a text, learned from pairs of sources and targets.

task      the task: what it measures, writes, saves
rows      its pairs as batches, and which of them the network can read
scores    exact match and chrF
"""

from __future__ import annotations

from .task import TranslationTask

__all__ = ["TranslationTask"]
