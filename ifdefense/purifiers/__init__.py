"""Purifiers: from attacked clouds to clean ones."""
