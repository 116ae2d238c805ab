"""Knows what a checkpoint's bytes mean and when it exists: names, digests, shards, manifests, commits.
Must not know torch, live tensors, or process groups; it sees bytes, boxes and plain values only.
Start at ``manifest.py`` for what a checkpoint is, then ``commit.py`` for how one comes to exist."""
