"""What a run's folder tells: reports of a run, differences between checkpoints, as values and as pages.

Knows checkpoints, metrics and evaluations as they are stored; changes none of them. Start at ``report.py``.
"""
