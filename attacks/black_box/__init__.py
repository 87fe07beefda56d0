"""Score-based and transfer attacks."""
