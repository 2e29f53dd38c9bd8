"""Many runs of one experiment with Ray Tune: what sweep.py is made of."""
