"""Export of models to other formats, each result compared with its source before it is written."""
