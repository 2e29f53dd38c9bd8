"""Measures the training loop's speed, relative to its own limit and to other loops."""

PREPARATION = "preparation"
GROUPS = ["loop", "peers", "mlflow", "checkpoint", "launch", "scaling"]
