"""Training of the implicit function: shapes to occupancies to weights."""
