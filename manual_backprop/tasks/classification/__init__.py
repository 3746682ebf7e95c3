"""task=classification: predict the label of a text.

task.py        the task: an encoder, mean pooling without padding, cross-entropy over the labels
rows.py        texts as batches, and the order of training, with augmentation
measures.py    accuracy and macro F1, the confusion matrix and its picture
baselines.py   the most frequent label, and TF-IDF with logistic regression, on the same texts
classifier.py  inference: from texts to labels
"""

from .task import ClassificationTask

__all__ = ["ClassificationTask"]
