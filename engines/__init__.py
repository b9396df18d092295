"""Reading, selecting and running bundles. Imports neither torch nor transformers."""
