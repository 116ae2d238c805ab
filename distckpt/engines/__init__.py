"""Training engines: what each one calls its parts, and the state around them (random numbers, data order).

``torch`` knows the torch-native layouts; ``rng`` and ``sampler`` serve every engine.
"""
