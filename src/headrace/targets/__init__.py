"""What can run a bundle: ONNX Runtime on the host, the device graphs, Qualcomm's compiler, emulator and Genie."""
