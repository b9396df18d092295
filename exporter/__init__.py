"""From a PyTorch model to checked ONNX graphs."""
