"""Speed and memory of prunectl beside what it replaces, in one run."""
