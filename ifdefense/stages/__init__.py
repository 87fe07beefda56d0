"""The stages of the defence, in the order of the pipeline: outliers, extraction, repair, resampling."""
