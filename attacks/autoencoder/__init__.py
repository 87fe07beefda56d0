"""Auto-encoder of AdvPC: network and training."""
