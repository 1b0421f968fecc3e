"""Sweeps as launchers start them, and the commands about their runs."""
