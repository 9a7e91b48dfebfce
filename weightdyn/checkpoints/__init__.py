"""Trainings that nobody logged: series of checkpoints, recipes, recovered forces, published logs."""
