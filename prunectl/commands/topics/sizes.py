"""How sizes and ratios are written, and what is measured."""

from __future__ import annotations

from prunectl.measuring.codecs import CodecName


def text() -> str:
    """Return the text."""
    return f"""
Sizes and ratios

  400KB  1.5MB    powers of 1000
  5MiB            powers of 1024
  5242880         bytes
  0.8  80%        a ratio; a bare 80 is refused, for it may mean either

Three sizes of a model are different things:

  raw         bytes of the file, or of all files in the folder
  packed      with the lossless compression of its own container (--pack), which
              every loader undoes by itself
  compressed  what a download or an app package comes to

Zeros alone do not make a raw file smaller: they make it compress better. To get
a smaller file, prune and --pack, or cut channels out (prunectl help patterns).

Codecs of prunectl size: {", ".join(CodecName)}. Gzip is stock zlib at level 6, to
the byte what Python's gzip.compress(data, 6, mtime=0) gives. A folder is
measured as a sorted tar without times.

A sparsity is the share of zeros among the weights that may be pruned: kernels,
and not biases, norms or embeddings.
"""
