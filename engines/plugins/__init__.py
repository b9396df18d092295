"""The merge operators as TensorRT plugins: Triton kernels, compiled where an engine is built and stored in it."""
