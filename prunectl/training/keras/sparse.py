"""TensorFlow's gradients of embeddings, which name the rows that they are of."""

from __future__ import annotations

from typing import Any


def where_kept(tf: Any, mask: Any, value: Any) -> Any:
    """Return a gradient where a mask keeps it, and zero elsewhere, in the form that it has."""
    if isinstance(value, tf.IndexedSlices):
        rows = tf.gather(mask, value.indices)
        return tf.IndexedSlices(
            tf.where(rows, value.values, tf.zeros_like(value.values)), value.indices, value.dense_shape
        )
    return tf.where(mask, value, tf.zeros_like(value))


def dense(tf: Any, value: Any) -> Any:
    """Return a gradient with all of its rows."""
    if isinstance(value, tf.IndexedSlices):
        return tf.math.unsorted_segment_sum(value.values, value.indices, value.dense_shape[0])
    return value
