"""Which weights go first."""

from __future__ import annotations

from prunectl.commands.topics.table import aligned
from prunectl.pruning.strategies import STRATEGIES, Needs

_BLANK = "\n\n"
_NEEDS = {
    Needs.NOTHING: "By the weights alone",
    Needs.GRADIENTS: "By gradients: prune --data SPEC, or finetune",
    Needs.INPUTS: "By what weights are multiplied with: --data SPEC",
    Needs.PRODUCTS: "By how the inputs of a layer go together: --data SPEC",
    Needs.TRAINING: "By watching training: finetune only",
}


def text() -> str:
    """Return the text."""
    parts = [
        f"{title}\n\n{aligned((one.name, one.line) for one in STRATEGIES if one.needs is needs)}"
        for needs, title in _NEEDS.items()
        if any(one.needs is needs for one in STRATEGIES)
    ]
    return f"""
Strategies: which weights go first

{_BLANK.join(parts)}

Equal scores go in the order of the file, so that the same input gives the same
bytes on any machine. --scope layer ranks within each layer, --scope global over
all. --repair fits what stays anew, from the same data. A function of your own
is ./file.py:name or package.module:name (prunectl help extending). Channels
have measures of their own: prunectl plugins channels.
"""
