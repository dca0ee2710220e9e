"""`python -m benchmarks [NAME...]`: every benchmark, or those named."""

from __future__ import annotations

import sys

from benchmarks import (
    big_files,
    calibration,
    calibration_cost,
    channels_keras,
    channels_onnx,
    channels_torch,
    channels_training,
    export_sizes,
    faults,
    fuzz,
    growth,
    latency,
    llama,
    overhead,
    pruning,
    scripts,
    startup,
    training,
)

ALL = {
    "startup": startup.run,
    "scripts": scripts.run,
    "big_files": big_files.run,
    "pruning": pruning.run,
    "growth": growth.run,
    "overhead": overhead.run,
    "training": training.run,
    "calibration": calibration.run,
    "calibration_cost": calibration_cost.run,
    "matching": calibration.matched,
    "scopes": calibration.scopes,
    "channels_torch": channels_torch.run,
    "channels_onnx": channels_onnx.run,
    "channels_keras": channels_keras.run,
    "channels_training": channels_training.run,
    "export_sizes": export_sizes.run,
    "latency": latency.run,
    "llama": llama.run,
}

ON_REQUEST = {"faults": faults.run, "fuzz": fuzz.run, "parts": growth.parts, "workers": growth.workers}
"""Long: only by their names."""

for name in sys.argv[1:] or ALL:
    (ALL | ON_REQUEST)[name]()
