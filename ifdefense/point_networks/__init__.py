"""Networks that map clouds to clouds."""
