"""Attributes of HDF5 objects, carried over with their exact types: to be called in a child."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np


class NotPortableError(Exception):
    """What only means something in the file that it stands in, such as a reference."""


def copy_attributes(old: Any, new: Any) -> None:
    """Give an object the attributes of another, bit by bit, in the same order."""
    for key in old.attrs:
        attribute = old.attrs.get_id(key)
        kind = attribute.get_type()
        if kind.detect_class(h5py.h5t.REFERENCE):
            raise NotPortableError(key)
        name = key.encode("utf-8", "surrogateescape")
        made = h5py.h5a.create(new.id, name, kind.copy(), attribute.get_space())
        if attribute.shape is None:
            continue
        if attribute.dtype.hasobject:
            # Texts of any length are objects on their way; the type in the file decides how they are stored.
            values, memory = np.empty(attribute.shape, attribute.dtype), h5py.h5t.py_create(attribute.dtype)
        else:
            values, memory = np.empty((*attribute.shape, kind.get_size()), np.uint8), kind
        attribute.read(values, mtype=memory)
        made.write(values, mtype=memory)
