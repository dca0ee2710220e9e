"""ONNX files: one protobuf message, with or without data beside it."""
