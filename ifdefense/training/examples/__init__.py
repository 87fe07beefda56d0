"""What a batch is: corrupted inputs with queries, labels or targets, drawn from the data."""
