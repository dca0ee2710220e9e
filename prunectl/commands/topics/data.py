"""How examples are named."""

from __future__ import annotations

from prunectl.training.data.columns import OPTIONS as COLUMNS
from prunectl.training.data.grammar import GENERAL
from prunectl.training.data.images import OPTIONS as IMAGES
from prunectl.training.data.records import OPTIONS as RECORDS


def text() -> str:
    """Return the text."""
    return f"""
Data: how examples are named, the same in every command

  train.npz                   arrays x and y, or x_train and y_train
  train.npz[imgs,labels]      arrays by name; several inputs as [a+b,labels]
  x.npy,y.npy                 one array a file
  images/                     pictures; folders in it are classes
  table.csv?target=label      a table; also .parquet
  '*.tfrecord?schema=f.json'  TFRecord files
  package.module:function     a function that gives (x, y) or batches of them
  ./file.py:function          the same, in a file
  random:64                   made up, to try whether something runs

Options follow a question mark, with & between them:

  norm=unit  norm=/16   divide by 255, or by 16; also imagenet and MEAN:STD
  shape=1x28x28         of each input
  limit=1000            only the first
  classes=0,3,5         only these labels; relabel=1 numbers them anew
  onehot=10  flatten    what they say

For all: {", ".join(GENERAL)}.
For pictures: {", ".join(IMAGES)}. For tables: {", ".join(COLUMNS)}.
For TFRecords: {", ".join(RECORDS)}.

Quote a SPEC with ? * [ or & in it. Shapes, types, labels and NaN are checked
before anything is run, and what was decided for you is said.
"""
