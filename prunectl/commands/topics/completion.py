"""How a shell completes."""

from __future__ import annotations


def text() -> str:
    """Return the text."""
    return """
Completion in bash, zsh and fish

  prunectl --install-completion     for the shell that you are in
  prunectl --show-completion bash   only prints the script

Commands, options and their values are completed, and names of layers and
tensors of the model that stands before them:

  prunectl prune model.h5 --layer <Tab>
  prunectl prune model.h5 --strategy <Tab>
  prunectl help <Tab>

Nothing of the model is read but its list of tensors.
"""
