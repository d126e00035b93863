"""What runs a graph: ONNX Runtime, TensorRT or torch, on the CPU or a GPU."""
