"""Training: `data` sources, `examples` (batches) and `recipes` (one per network), with resumable runs."""
