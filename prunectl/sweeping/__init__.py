"""Many ways to prune one model, tried on its user's own data: strategies, scopes, sparsities, schedules."""
