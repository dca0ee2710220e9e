"""One file a verb: resolve what the user named, call, show."""
