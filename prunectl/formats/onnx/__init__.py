"""ONNX models: a protobuf message, with or without external data files."""
