"""Benchmarks: every figure beside the raw limit and the peers, measured in one interleaved run."""
