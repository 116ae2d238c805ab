"""Which checkpoint is the best, and is it really: evaluation, its record, selection, statistics, ensembles.

``evaluate.py`` runs a model over data and keeps every row's prediction; everything after that (``metrics.py``,
``select.py``, ``statistics.py``, ``ensemble.py``) works on what was kept, without the model.
"""
