"""The configuration groups, the one home of default values."""
