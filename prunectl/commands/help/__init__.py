"""`prunectl help`: topics and the manual page."""
