"""What needs gradients: data, and one runtime for each framework."""
