"""From a PyTorch model to checked ONNX graphs of every ratio, in one bundle."""
