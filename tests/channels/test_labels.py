"""Labels that are united, locked, and looked at along axes."""

from __future__ import annotations

import numpy as np

from prunectl.channels.labels import UnionFind, fixed, spread


def test_united_labels_have_one_root_whichever_way_they_were_united() -> None:
    labels = UnionFind()
    one, two, three = (labels.fresh(4) for _ in range(3))
    labels.unite(two, three, "")
    labels.unite(three[::-1], one, "")
    roots = labels.roots(np.stack([one, two[::-1], three[::-1]]))
    assert (roots == roots[0]).all()
    assert len(set(roots[0])) == 4


def test_a_lock_holds_for_all_that_is_united_before_or_after() -> None:
    labels = UnionFind()
    one, two = labels.fresh(3), labels.fresh(3)
    labels.lock(two[:1], "because")
    labels.unite(one, two, "")
    labels.lock(one[1:2], "therefore")
    assert [labels.reason(int(root)) for root in labels.roots(two)] == ["because", "therefore", ""]


def test_what_is_united_with_what_is_fixed_is_locked() -> None:
    labels = UnionFind()
    one = labels.fresh(2)
    labels.unite(one, fixed((2,)), "it stays")
    assert [labels.reason(int(root)) for root in labels.roots(one)] == ["it stays", "it stays"]
    assert labels.reason(0) == ""


def test_a_value_is_labelled_along_the_axis_of_its_channels_alone() -> None:
    labels = UnionFind()
    value = spread(labels.fresh(3), 1, (2, 3, 5, 5))
    assert labels.varying(value) == (1,)
    assert labels.along(value, 1) is not None
    assert labels.along(value, 2) is None
    flat = value.reshape(2, 75)
    assert labels.varying(flat) == (1,)
    assert labels.varying(value.reshape(2, 3, 25).transpose(0, 2, 1)) == (2,)


def test_labels_that_became_one_do_not_vary() -> None:
    labels = UnionFind()
    line = labels.fresh(2)
    labels.unite(line[:1], line[1:], "")
    assert labels.varying(line) == ()


def test_a_broadcast_value_costs_nothing() -> None:
    labels = UnionFind()
    one, two = (spread(labels.fresh(3), 1, (1, 3, 10_000, 100_000)) for _ in range(2))
    labels.unite(one, two, "")
    assert labels.varying(one) == (1,)
    assert labels.roots(one[0, :, 0, 0]).tolist() == labels.roots(two[0, :, 0, 0]).tolist()
