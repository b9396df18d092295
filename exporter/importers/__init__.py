"""Checkpoints that others wrote, turned into method checkpoints. One file per method."""
