"""Everything about a built family: the bundle, its engines, the choice among them. No torch, no transformers."""
