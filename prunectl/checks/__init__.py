"""What a model is held against: budgets, baselines, other models, and the record of its own making."""
