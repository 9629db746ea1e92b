"""The one idea: a room is a log, a client is a cursor."""
