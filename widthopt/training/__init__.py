"""Training: the loop, evaluation, checkpoints, devices and process groups."""
