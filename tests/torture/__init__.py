"""A fault campaign: what becomes of runs that are killed, starved or lied to. `make torture` runs all of it.

Every outcome is one of those that ``outcomes`` names. All chance comes from a seed that is printed, so that what was
found can be repeated: `python -m tests.torture --seed 7 --only kills`.
"""
