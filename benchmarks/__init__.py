"""Measurements of attacks and defences, and the demo."""
