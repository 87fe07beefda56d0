"""Training of the networks: data, resumable runs and what they write."""
