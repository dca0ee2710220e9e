"""What forked processes have at hand: imported, and then left alone, without looking for garbage in it.

A collection in a child would copy each page that it looks at, which takes a second.
"""

import gc
from importlib import import_module

gc.disable()
# Not Keras 3, which asks for its backend when it is loaded.
for _name in ("pytest", "torch._dynamo", "tf_keras", "prunectl.training.torch.model"):
    import_module(_name)
gc.freeze()
gc.enable()
