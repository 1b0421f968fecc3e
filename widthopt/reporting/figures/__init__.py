"""Figures and tables, drawn only from records. Each kind has its own module."""
