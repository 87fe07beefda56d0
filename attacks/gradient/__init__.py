"""Attacks that take gradient steps within a budget."""
