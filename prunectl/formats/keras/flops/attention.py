"""Keras layers that multiply what they are given: attention, dot products, Einstein sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prunectl.formats.base import Length, Shape
from prunectl.formats.keras.flops.shapes import LayerCall, Matmul, UnknownShapeError, untuple

_MAX_LABELS = 64


def projected(step: LayerCall) -> Iterator[Matmul]:
    """Yield the projections of an attention with several heads, and its two products of what they give."""
    query, key, value = _three(step)
    heads, width = step.number("num_heads"), step.number("key_dim")
    depth = step.number("value_dim", width)
    yield Matmul("query/kernel", (query[-1], heads, width), query[:-1])
    yield Matmul("key/kernel", (key[-1], heads, width), key[:-1], turn=1)
    yield Matmul("value/kernel", (value[-1], heads, depth), value[:-1], turn=2)
    yield Matmul("", (), (*query[:-1], *key[:-1], heads, width))
    yield Matmul("", (), (*query[:-1], *value[:-1], heads, depth))
    yield Matmul("output/kernel", (heads, depth, _attended(step)[-1]), query[:-1], turn=3)


def grouped(step: LayerCall) -> Iterator[Matmul]:
    """Yield the same where several heads of the query share one of the key."""
    query, key, value = _three(step)
    heads, few, width = step.number("num_query_heads"), step.number("num_key_value_heads"), step.number("head_dim")
    yield Matmul("query/kernel", (query[-1], heads, width), query[:-1])
    yield Matmul("key/kernel", (key[-1], few, width), key[:-1], turn=1)
    yield Matmul("value/kernel", (value[-1], few, width), value[:-1], turn=2)
    for other in (key, value):
        yield Matmul("", (), (*query[:-1], *other[:-1], heads, width))
    yield Matmul("output/kernel", (heads, width, query[-1]), query[:-1], turn=3)


def compared(step: LayerCall) -> Iterator[Matmul]:
    """Yield the two products of an attention without weights."""
    query, value = step.shape(0), step.shape(1, "value")
    key = step.shape(2) if len(step.inputs) > 2 else value
    yield Matmul("", (), (*query, *key[-2:-1]))
    yield Matmul("", (), (*query[:-1], *value[-2:]))


def dotted(step: LayerCall) -> Iterator[Matmul]:
    """Yield the one product of two inputs."""
    _, gone = _contracted(step)
    yield Matmul("", (), (*step.shape(0), *(length for at, length in enumerate(step.shape(1)) if at != gone)))


def summed(step: LayerCall) -> Iterator[Matmul]:
    """Yield the product of an Einstein sum: every label runs once."""
    given, weight, made = _labels(step)
    lengths = _lengths(step, given, made)
    yield Matmul(
        "kernel",
        tuple(lengths[label] for label in weight),
        tuple(lengths[label] for label in given[1:] if label not in weight),
    )


def _three(step: LayerCall) -> tuple[Shape, Shape, Shape]:
    query, value = step.shape(0, "query"), step.shape(1, "value")
    has_key = len(step.inputs) > 2 or step.keywords.get("key") is not None
    return query, step.shape(2, "key") if has_key else value, value


def _attended(step: LayerCall) -> Shape:
    query = step.shape(0, "query")
    said = untuple(step.config.get("output_shape"))
    if said is None:
        return query
    last = [said] if type(said) is int else said
    if not isinstance(last, list) or not all(type(length) is int for length in last):
        raise UnknownShapeError
    return (*query[:-1], *last)


def _same_as_query(step: LayerCall) -> Shape:
    return (*step.shape(0)[:-1], step.shape(1, "value")[-1])


def _same(step: LayerCall) -> Shape:
    return step.shape(0, "query")


def _contracted(step: LayerCall) -> tuple[int, int]:
    left, right = step.shape(0), step.shape(1)
    first, second = step.numbers("axes", 2)
    places = tuple(axis + len(shape) if axis < 0 else axis - 1 for axis, shape in ((first, left), (second, right)))
    if not 0 <= places[0] < len(left) or not 0 <= places[1] < len(right):
        raise UnknownShapeError
    return places[0], places[1]


def _dot(step: LayerCall) -> Shape:
    left, right = _contracted(step)
    rest = tuple(
        length
        for shape, gone in ((step.shape(0), left), (step.shape(1), right))
        for at, length in enumerate(shape)
        if at != gone
    )
    return rest or (1,)


def _labels(step: LayerCall) -> tuple[str, str, str]:
    """Return the labels of the input, of the kernel and of the output, dots replaced by labels of their own."""
    equation = step.config.get("equation")
    if not isinstance(equation, str) or len(equation) > _MAX_LABELS:
        raise UnknownShapeError
    left, _, made = equation.replace(" ", "").partition("->")
    given, _, weight = left.partition(",")
    if "..." in given:
        spare = (chr(0x100 + number) for number in range(_MAX_LABELS))
        missing = len(step.shape()) + 1 - len(given.replace("...", ""))
        dots = "".join(next(spare) for _ in range(min(max(missing, 0), _MAX_LABELS - 1)))
        given, made = given.replace("...", dots), made.replace("...", dots)
    if not given or not made or len(given) != len(step.shape()) + 1 or "." in given + weight + made:
        raise UnknownShapeError
    return given, weight, made


def _lengths(step: LayerCall, given: str, made: str) -> dict[str, Length]:
    known: dict[str, Length] = dict(zip(given[1:], step.shape(), strict=True))
    said = untuple(step.config.get("output_shape"))
    wanted = [said] if type(said) is int else said if isinstance(said, list) else []
    # The output shape may leave out leading axes, which then are those of the input.
    for label, length in zip(reversed(made), reversed(wanted), strict=False):
        if type(length) is int:
            known.setdefault(label, length)
            if known[label] is None:
                known[label] = length
    return _Lengths(known)


class _Lengths(dict[str, Length]):
    """Lengths by label; of a label that nobody explained it is unknown."""

    def __missing__(self, label: str) -> Length:
        return None


def _einsum(step: LayerCall) -> Shape:
    given, _, made = _labels(step)
    lengths = _lengths(step, given, made)
    return tuple(lengths[label] for label in made if label != given[0])


RULES: dict[str, Callable[[LayerCall], Shape]] = {
    "MultiHeadAttention": _attended,
    "GroupQueryAttention": _same,
    "Attention": _same_as_query,
    "AdditiveAttention": _same_as_query,
    "Dot": _dot,
    "EinsumDense": _einsum,
}
