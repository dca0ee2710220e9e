"""Training and evaluation of saved models: data sources, and a runtime for each framework."""
