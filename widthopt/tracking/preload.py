"""W&B imported and no more, for processes that tracked runs are forked from."""

import os


os.environ["WANDB_ERROR_REPORTING"] = "false"  # which W&B reads as it is imported

import wandb  # noqa: F401
