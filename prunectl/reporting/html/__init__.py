"""A report as one file for a browser: no network, no code but its own, everything escaped."""
