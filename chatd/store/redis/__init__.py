"""The log in Redis or Valkey, for many nodes."""
