"""Audits of runs: what a folder says (record.py), computing it again (replay.py), comparing both (compute.py)."""
