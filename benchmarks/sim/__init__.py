"""Thousands of ranks without any: the planner's and the metadata path's own code on shape-only states."""
