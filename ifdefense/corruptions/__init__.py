"""Corruptions of clouds: simulated attacks for training, natural corruptions for evaluation."""
