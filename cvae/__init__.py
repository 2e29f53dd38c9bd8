"""One experiment, from its configuration to its pictures. Knows no SLURM, no Ray and no command line."""
