"""ONNX graphs from the decoder: the only home of onnx."""
