"""How fast the training loop is, beside its own limit and beside other loops."""

PREPARATION = "preparation"
GROUPS = ["loop", "peers", "mlflow", "checkpoint", "launch", "scaling"]
