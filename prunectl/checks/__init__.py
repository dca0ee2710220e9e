"""Checks of models against budgets, baselines, other models and their manifests."""
