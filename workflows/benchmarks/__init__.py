"""How fast the training loop is, beside its own limit and beside other loops."""
