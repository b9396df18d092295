"""The graphs of a family: made, compared with PyTorch, described for the manifest; one class a method."""
