"""ONNX models as onnxruntime runs them: looked at, never trained."""
