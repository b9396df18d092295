"""Training models that share layers, so that fewer, larger steps of them are worth running."""
