"""The parts of scripts/bench.  They need the standard library only, so that they run before the environment exists.

- server.py: the server under load, and what it cost
- messages.py: the messages that are posted, plain or compressed
- streams.py: the check that every client of a room received every message once and in order
- load.py: the clients of a server, and the loads of one room and of many
- storm.py: a server that is killed under its clients, which return all at once
- report.py: medians of rounds, and the tables
- plot.py: the drawing
"""
