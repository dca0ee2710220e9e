"""Images in folders, with one folder for each class."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.formats.safe_json import require
from prunectl.training.backend import ModelSignature
from prunectl.training.data.readers import IndexedSource
from prunectl.training.data.source import Batch, Indices
from prunectl.training.data.spec import PICTURE_SUFFIXES, DataSpec, parse_shape, pictures_in, require_path

_MODES = {"grey": "L", "rgb": "RGB"}
COLORS = tuple(_MODES)


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """The common format of all images."""

    color: str
    """One of COLORS."""
    size: tuple[int, int] | None
    """Height and width in pixels; None for no resizing."""
    is_channels_first: bool = False
    has_channels: bool = True
    """Whether arrays have a channel axis, even for a single channel."""


def decode(picture: Path | bytes, options: ImageOptions, what: str) -> Array:
    """Decode an image to uint8 pixels, resized (bilinear) if it has another size."""
    image = require("PIL.Image", extra="images")
    try:
        with image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as file:
            pixels = require("PIL.ImageOps", extra="images").exif_transpose(file).convert(_MODES[options.color])
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise InputError(f"{what} cannot be read as an image: {error}") from error
    if options.size is not None and pixels.size != options.size[::-1]:
        pixels = pixels.resize(options.size[::-1], image.Resampling.BILINEAR)
    return _arrange(np.array(pixels, np.uint8), options)


def _arrange(pixels: Array, options: ImageOptions) -> Array:
    if pixels.ndim == 2 and options.has_channels:
        pixels = pixels[:, :, None]
    return np.moveaxis(pixels, -1, 0) if options.is_channels_first and pixels.ndim == 3 else pixels


_LISTED = 5


def open_images(spec: DataSpec, signature: ModelSignature | None, *_: object) -> IndexedSource:
    """Open `images/?size=28x28&color=grey`."""
    require("PIL.Image", extra="images")
    if not require_path(spec.path).is_dir():
        raise InputError(f"{spec.path} is not a folder")
    files, labels, classes = _list_images(spec.path)
    options = _image_options(spec, signature)
    shape = decode(files[0], options, str(files[0])).shape

    def pixels(number: int) -> Array:
        image = decode(files[number], options, str(files[number]))
        if image.shape != shape:
            raise InputError(
                f"the images differ in size: {files[number]} is {image.shape}, {files[0]} is {shape}",
                hint=f"resize all of them: '{spec.where}?size=224x224'",
            )
        return image

    def take(numbers: Indices) -> Batch:
        x = np.empty((len(numbers), *shape), np.uint8)
        for index, number in enumerate(numbers):
            x[index] = pixels(int(number))
        return Batch(x, labels[numbers] if classes else None)

    known = (lambda numbers: labels[numbers]) if classes else None
    return IndexedSource(spec.text, len(files), bool(classes), take, known, notes=_notes(spec, classes, options))


def _list_images(folder: Path) -> tuple[list[Path], Array, list[str]]:
    """All image files, their class labels, and the names of the classes."""
    flat = pictures_in(folder)
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if flat and classes:
        raise InputError(
            f"{folder} holds both images and folders ({classes[0]}, ...)",
            hint="put each image into the folder of its class, or all images into one folder without subfolders",
        )
    if not classes and not flat:
        raise InputError(f"{folder} holds no images", hint=f"prunectl looks for {' '.join(sorted(PICTURE_SUFFIXES))}")
    files_of_classes = [pictures_in(folder / name) for name in classes]
    for name, files in zip(classes, files_of_classes, strict=True):
        if not files:
            inside = sorted(child.name for child in (folder / name).iterdir() if child.is_dir())
            hint = f"if {folder / name} is the folder of the classes, name it instead" if inside else ""
            raise InputError(f"{folder / name} holds no images, although each folder is read as a class", hint=hint)
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in files_of_classes])
    return [file for files in files_of_classes for file in files] or flat, labels, classes


def _image_options(spec: DataSpec, signature: ModelSignature | None) -> ImageOptions:
    """The image format from the options, and from the model's input where they do not say."""
    first = bool(signature and signature.is_channels_first)
    shape = signature.inputs[0].shape if signature and signature.inputs else None
    height, width, channels = _expected_size(shape, is_channels_first=first)
    if "size" in spec.options:
        size = parse_shape("size", spec.options["size"])
        if len(size) != 2:
            raise UsageError(
                f"size={spec.options['size']} is not a size", hint="write height x width, as in size=28x28"
            )
        height, width = size
    color = spec.options.get("color", {1: "grey", 3: "rgb", None: "rgb"}.get(channels, ""))
    if color not in COLORS:
        reason = f"color={color} is not known" if color else f"the model takes {channels} channels"
        raise UsageError(f"{reason}: images can be {' or '.join(COLORS)}")
    size_known = None if height is None or width is None else (height, width)
    return ImageOptions(
        color, size_known, first, has_channels=not (shape is not None and len(shape) == 2 and color == "grey")
    )


def _expected_size(shape: Sequence[int | None] | None, *, is_channels_first: bool) -> tuple[int | None, ...]:
    """Height, width and channels of the model's input, as far as they are known."""
    if shape is None or len(shape) not in {2, 3}:
        return None, None, None
    if len(shape) == 2:
        return shape[0], shape[1], 1
    return (shape[1], shape[2], shape[0]) if is_channels_first else (shape[0], shape[1], shape[2])


def _notes(spec: DataSpec, classes: list[str], options: ImageOptions) -> tuple[str, ...]:
    note = f"{spec.where}: images are read as {options.color}"
    if options.size is not None:
        note += f" and resized to {options.size[0]}x{options.size[1]}"
    if not classes:
        return (note,)
    more = ", ..." if len(classes) > _LISTED else ""
    named = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:_LISTED]))
    return (note, f"{spec.where}: {len(classes)} classes, one for each folder: {named}{more}")
