"""From any model to another format, held against what it was made from before it is written."""
