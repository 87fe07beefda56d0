"""How each network is trained: one ``ifdefense train`` command per file."""
