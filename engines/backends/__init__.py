"""Runtimes that execute a bundle's graphs."""
