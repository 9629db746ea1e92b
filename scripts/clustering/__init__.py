"""The parts of scripts/cluster.

- processes.py: the processes of a cluster, which start, stop and fail on command
- ledger.py: the ledger of posts, acks and deliveries, which counts faults
- load.py: the clients, which post and read
- scenarios.py: the scenarios, in which something fails
- scale.py: the cost of messages, when nothing fails
"""
