"""Trainings: `data` are drawn into `examples`, from which `recipes` train networks in a resumable run."""
