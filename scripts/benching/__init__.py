"""The parts of scripts/bench.  They need the standard library only, because the script makes the environment.

- server.py: the server under load, and the processor time that it takes
- messages.py: the handshakes and posts of clients, and compression
- streams.py: the check of what the clients of a room receive
- load.py: the clients of a server, and the loads on one room and on many
- modes.py: the measurements, and their order
- storm.py: the kill of a server, and the return of its clients
- report.py: medians of rounds, and the tables
- plot.py: the drawing
"""
