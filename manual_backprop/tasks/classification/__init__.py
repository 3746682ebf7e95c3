"""task=classification: which label a text has.

task.py        the task: an encoder, the mean over real positions, cross-entropy over the labels
rows.py        texts as batches, and the order of training, which may change the texts a little
measures.py    accuracy and macro F1, the confusion matrix and its picture
baselines.py   the majority, and TF-IDF with logistic regression, on the same texts
classifier.py  a trained model asked: from texts to labels
"""

from .task import ClassificationTask

__all__ = ["ClassificationTask"]
