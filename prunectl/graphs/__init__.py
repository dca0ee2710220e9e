"""Graph languages that several rooms need."""
