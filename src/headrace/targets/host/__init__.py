"""A bundle's host graphs on ONNX Runtime's CPU kernels."""
