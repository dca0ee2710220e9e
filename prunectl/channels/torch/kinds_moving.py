"""Operations of PyTorch that move numbers about."""

from __future__ import annotations

from prunectl.channels.graph import Kind, Node
from prunectl.channels.torch.seen import Seen

Steps = tuple[Node, ...]


def cat(seen: Seen) -> Steps:
    """Read what is put one behind the other."""
    return (seen.made(Kind.CONCAT, _listed(seen), axis=seen.arg("dim", 0)),)


def stack(seen: Seen) -> Steps:
    """Read what is put one behind the other along an axis of its own."""
    shape, axis = seen.result, seen.arg("dim", 0) % len(seen.result)
    single = (*shape[:axis], 1, *shape[axis + 1 :])
    parts = {seen.between(f"part{number}", single): name for number, name in enumerate(_listed(seen))}
    longer = tuple(seen.made(Kind.RESHAPE, (name,), (part,)) for part, name in parts.items())
    return (*longer, seen.made(Kind.CONCAT, parts, axis=axis))


def chunk(seen: Seen) -> Steps:
    """Read what is taken apart along an axis."""
    before, axis = seen.shapes[seen.tensors[0]], seen.arg("dim", 0)
    axis %= len(before)
    sizes = [seen.shapes[name][axis] for name in seen.outputs if name in seen.shapes]
    if len(sizes) < len(seen.outputs) or sum(sizes) > before[axis]:
        return ()
    outputs = list(seen.outputs)
    if rest := before[axis] - sum(sizes):
        outputs.append(seen.between("rest", (*before[:axis], rest, *before[axis + 1 :])))
        sizes.append(rest)
    return (seen.made(Kind.SPLIT, seen.tensors[:1], outputs, axis=axis, sizes=tuple(sizes)),)


def unbind(seen: Seen) -> Steps:
    """Read what is taken apart along an axis that is no more."""
    axis = seen.arg("dim", 0) % len(seen.shapes[seen.tensors[0]])
    found: list[Node] = []
    for number, name in enumerate(seen.outputs):
        if name in seen.shapes:
            found += _one(seen, axis, number, name)
    return tuple(found)


def select(seen: Seen) -> Steps:
    """Read one of what lies along an axis; behind the first it is a position, and no channel."""
    before = seen.shapes[seen.tensors[0]]
    axis, number = seen.arg("dim", 0) % len(before), seen.arg("index", 0)
    if axis:
        return (seen.made(Kind.STRETCH, seen.tensors[:1], axes=(axis,)),)
    return tuple(_one(seen, axis, number % before[axis], seen.outputs[0]))


def slice_(seen: Seen) -> Steps:
    """Read a part of an axis."""
    before = seen.shape("self")
    axis = seen.arg("dim", 0) % len(before)
    bounds = slice(seen.arg("start"), seen.arg("end"), seen.arg("step", 1)).indices(before[axis])
    return (seen.made(Kind.SLICE, seen.tensors[:1], slices=((axis, *bounds),)),)


def narrow(seen: Seen) -> Steps:
    """Read a part of an axis, by where it begins and how long it is."""
    before = seen.shape("self")
    axis, start = seen.arg("dim") % len(before), seen.arg("start")
    start %= before[axis]
    return (seen.made(Kind.SLICE, seen.tensors[:1], slices=((axis, start, start + seen.arg("length"), 1),)),)


def index_select(seen: Seen) -> Steps:
    """Read positions taken in another order."""
    return (seen.made(Kind.STRETCH, (seen.name("self"),), axes=(seen.arg("dim") % len(seen.shape("self")),)),)


def reshape(seen: Seen) -> Steps:
    """Read the same numbers in another shape."""
    return (seen.made(Kind.RESHAPE, seen.tensors[:1]),)


def permute(seen: Seen) -> Steps:
    """Read axes in another order."""
    rank = len(seen.result)
    return (seen.made(Kind.TRANSPOSE, seen.tensors, order=tuple(axis % rank for axis in seen.arg("dims"))),)


def transpose(seen: Seen) -> Steps:
    """Read two axes that change places."""
    names = ("axis0", "axis1") if "axis0" in seen.arguments else ("dim0", "dim1")
    order = list(range(len(seen.result)))
    one, other = (seen.arg(name) % len(order) for name in names)
    order[one], order[other] = order[other], order[one]
    return (seen.made(Kind.TRANSPOSE, seen.tensors, order=tuple(order)),)


def turned(seen: Seen) -> Steps:
    """Read all axes backwards."""
    return (seen.made(Kind.TRANSPOSE, seen.tensors, order=tuple(reversed(range(len(seen.result))))),)


def pixel_shuffle(seen: Seen) -> Steps:
    """Read channels that become positions: a reshape, a transposition, a reshape."""
    *front, channels, height, width = seen.shape("self")
    if len(front) != 1:
        return ()
    times = seen.arg("upscale_factor")
    apart = seen.between("apart", (*front, channels // times**2, times, times, height, width))
    order = (0, 1, 4, 2, 5, 3)
    moved = seen.between("moved", tuple(seen.shapes[apart][axis] for axis in order))
    return (
        seen.made(Kind.RESHAPE, seen.tensors, (apart,)),
        seen.made(Kind.TRANSPOSE, (apart,), (moved,), order=order),
        seen.made(Kind.RESHAPE, (moved,)),
    )


def channel_shuffle(seen: Seen) -> Steps:
    """Read channels of groups dealt out in turns: a reshape, a transposition, a reshape."""
    batch, channels, *space = seen.shape("self")
    groups = seen.arg("groups")
    apart = seen.between("apart", (batch, groups, channels // groups, *space))
    order = (0, 2, 1, *range(3, 3 + len(space)))
    moved = seen.between("moved", (batch, channels // groups, groups, *space))
    return (
        seen.made(Kind.RESHAPE, seen.tensors, (apart,)),
        seen.made(Kind.TRANSPOSE, (apart,), (moved,), order=order),
        seen.made(Kind.RESHAPE, (moved,)),
    )


def different(seen: Seen) -> Steps:
    """Read axes of length 1 that are made longer; new ones are put in front first."""
    before, after = seen.shape("self"), seen.result
    whole = (1,) * (len(after) - len(before)) + before
    axes = tuple(axis for axis, pair in enumerate(zip(whole, after, strict=True)) if len(set(pair)) > 1)
    if len(before) == len(after):
        return (seen.made(Kind.STRETCH, seen.tensors[:1], axes=axes),)
    longer = seen.between("longer", whole)
    return (
        seen.made(Kind.RESHAPE, seen.tensors[:1], (longer,)),
        seen.made(Kind.STRETCH, (longer,), axes=axes),
    )


def pad(seen: Seen) -> Steps:
    """Read edges, two numbers for each axis, the last axis first."""
    pads, rank = seen.arg("pad"), len(seen.result)
    axes = [rank - 1 - number // 2 for number, width in enumerate(pads) if width]
    return (seen.made(Kind.STRETCH, seen.tensors[:1], axes=tuple(sorted(set(axes)))),)


def _one(seen: Seen, axis: int, number: int, name: str) -> list[Node]:
    before = seen.shapes[seen.tensors[0]]
    single = seen.between(f"at{number}", (*before[:axis], 1, *before[axis + 1 :]))
    return [
        seen.made(Kind.SLICE, seen.tensors[:1], (single,), slices=((axis, number, number + 1, 1),)),
        seen.made(Kind.RESHAPE, (single,), (name,)),
    ]


def _listed(seen: Seen) -> tuple[str, ...]:
    """Return the names in a list of values: one may stand in it twice."""
    return tuple(one.name for one in seen.arguments["tensors"])
