"""When code that comes with a file may run."""

from __future__ import annotations


def text() -> str:
    """Return the text."""
    return """
Trust: when code that comes with a file may run

inspect, size, check, diff, verify, strip and prune by weights read bytes, and
run nothing: pickles are taken apart without being loaded.

What runs the model (finetune, export, --data, --pattern channel, --wrap) loads
it in its framework, once all that the file names is on a list of what is
harmless. What is not on it would run as code:

  whole modules of PyTorch   torch.save(model), a pickle of classes
  Lambda layers of Keras     Python code inside the file
  functions of TensorFlow    in a Keras file, where they do more than compute
  operations of a SavedModel or TorchScript that read or write files
  layers with a file or URL  a vocabulary, weights, another model
  programs of torch.export   pickled inputs, operators of other libraries

These are refused with exit code 3 unless you say --trust. Say it only of files
whose author you would let run a script.

  --model net.py:Net          builds the network; the file then needs to hold
                              weights alone, which is the better way
  --custom-objects mod:DICT   explains custom layers of Keras
  --import MOD                imported first

All three are your own code, and need no --trust.

A recipe or a file of budgets may be a stranger's as well. Code that it names,
such as data = "./data.py:load", runs only with --trust. In CI, check the pull
requests of forks without it.
"""
