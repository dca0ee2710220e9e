"""One set of findings, written in the ways that people and machines read them: from a value to a text."""
