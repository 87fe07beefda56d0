"""Stages of the pipeline: outlier removal, extraction, repair, resampling."""
