"""Averages of weights: while training (EMA, on each rank's own shards), of checkpoints, of live replicas.

May import ``engines``, ``dcp`` and ``format``; knows nothing of metrics or of selection. Start at ``ema.py``.
"""
