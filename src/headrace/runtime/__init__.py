"""From token ids to text: engine, sampling, generation, conversation. NumPy and a runner; never onnx, never torch."""
