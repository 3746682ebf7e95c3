"""Looking at a network while it learns: four numbers of each layer (`inspector`), and their pictures (`pictures`).

Not here: a step's tensors one by one (`study.explain`, `models.recorder`).
"""
