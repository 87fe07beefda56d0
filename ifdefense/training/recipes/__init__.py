"""Training of each network, one ``ifdefense train`` command per file."""
