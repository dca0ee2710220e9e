"""What forked processes have at hand: imported, and then left alone, without looking for garbage in it.

A collection in a child would copy each page that it looks at, which takes a second.
"""

import gc
import sys
from importlib import import_module

gc.disable()
for _name in ("pytest", "torch._dynamo", "prunectl.training.torch.model", "prunectl.commands.finetune"):
    import_module(_name)
import_module("prunectl.training.keras.backend").load_tfmot()
# It asks for its backend when it is loaded, and takes a second of each process that does not need it.
assert "keras" not in sys.modules, "tfmot was loaded with Keras 3"
gc.freeze()
gc.enable()
