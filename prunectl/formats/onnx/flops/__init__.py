"""Multiply-accumulate operations of ONNX models, with shape inference of our own."""
