"""Training the modules of Modular Transformers: one run, from which models of many sizes are assembled."""
