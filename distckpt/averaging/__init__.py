"""Averages of weights: while training (EMA, on each rank's own shards), and of checkpoints on storage, streamed.

Start at ``ema.py`` and ``average.py``; ``blend.py`` is an average that is not written yet, ``soup.py`` chooses what goes
into one.
"""
