"""Audits of runs: what a folder says (record.py), computing it again (compute.py). ``python -m cnnmpi.audit``."""
