"""Stores: where the logs of the rooms are kept.

`base` declares what every store does.  Each other module or package is one place to keep a log:
this process's memory, a SQLite file for one node, Redis for many nodes.
"""
