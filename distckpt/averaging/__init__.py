"""Averages of weights: of checkpoints on storage, streamed, whatever wrote them.

Start at ``average.py``; ``blend.py`` is an average that is not written yet, ``soup.py`` chooses what goes into one.
"""
