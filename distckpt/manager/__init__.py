"""The manager of a run's checkpoints: when to save, what to keep, staging, background saves, preemption.

Import the names you need from its modules, or from ``distckpt`` itself; this package imports nothing.
"""
