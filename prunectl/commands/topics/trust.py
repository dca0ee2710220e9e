"""When code that comes with a file may run."""

from __future__ import annotations


def text() -> str:
    """Return the text."""
    return """
Trust: when code that comes with a file may run

inspect, size, check, diff, verify, strip and prune by weights read bytes, and
run nothing: pickles are taken apart without being loaded.

What runs the model (finetune, export, --data, --pattern channel) loads it in
its framework. Some files bring code along, and would run it:

  whole modules of PyTorch   torch.save(model), a pickle of classes
  Lambda layers of Keras     Python code inside the file

These are refused with exit code 3 unless you say --trust. Say it only of files
whose author you would let run a script.

  --model net.py:Net          builds the network; the file then needs to hold
                              weights alone, which is the better way
  --custom-objects mod:DICT   explains custom layers of Keras
  --import MOD                imported first

All three are your own code, and need no --trust.
"""
