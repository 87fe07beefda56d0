"""Purifiers of attacked point clouds."""
