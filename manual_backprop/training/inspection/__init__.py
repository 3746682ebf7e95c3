"""Statistics of the layers during training: four numbers for each layer (`inspector`), and their pictures (`pictures`).

Not here: the single tensors of a step (`study.explain`, `models.recorder`).
"""
