"""Runs as pandas tables, and reports made of them."""
