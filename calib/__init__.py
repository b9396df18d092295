"""Whatever is fitted or measured on data."""
