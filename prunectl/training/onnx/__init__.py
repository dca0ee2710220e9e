"""ONNX models in onnxruntime: run and observed, never trained."""
