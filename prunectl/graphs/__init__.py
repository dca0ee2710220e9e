"""ONNX graphs as messages of protobuf: whatever is not understood stays in them as it was."""
