"""Examples to learn from, wherever they lie: one SPEC, one interface."""
