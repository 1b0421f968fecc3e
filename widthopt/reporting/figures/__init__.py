"""Figures and tables, drawn from records alone: one file for each kind."""
