"""`--depfile` and `--if-changed`: prunectl in a build system."""
