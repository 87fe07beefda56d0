"""Attacks without gradients of the model: score-based and transfer."""
