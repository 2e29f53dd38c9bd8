"""Checks and measures the trainer on the GPU at hand: `python -m tests.gpu_check`, at most nine minutes.

Every check runs the product's own code in a process of its own, without network, on data made on the spot.
Without a GPU the same checks run in a small size.
"""
