"""Gradient steps within a budget."""
