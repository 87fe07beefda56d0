"""Training batches: corrupted inputs with queries, labels or targets."""
