"""Audits of runs: what a folder says (record.py), computing it again (replay.py), comparing both (compute.py).

shaping.py tells what shapes runs, ranks.py how a command computes on all ranks: bisect/ uses both.
"""
