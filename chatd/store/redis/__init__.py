"""A log in Redis (6.2 or later) or Valkey: many nodes, one room.

The log is a few keys (`lua/prelude.lua`).  Only Lua scripts write to them, and each script is atomic.
Whichever node receives a post, Redis numbers it, stamps it, stores it in the stream of its room, and appends it
to one more stream, the *feed* of all rooms.  Every node reads the feed and learns of messages only from it,
including its own.  All clients of all nodes therefore see one order.

- `link`: finds the primary and connects to it.
- `redis_session`: keeps two connections open, and notices when the log is another one or went back.
- `feed`: reads the feed, and holds back acknowledgements and pages until the feed has reached them.
- `lobby`: shares presence between the nodes.
- `shared_sanctions`: shares bans and mutes between them.
- `store`: posts and reads; implements `chatd.store.base.Store`.

The limit: Redis replies before a replica has the message and, depending on how it is configured, before the disk has
it (docs/operations.md).  A loss is never hidden: the epoch is replaced, and every node rereads its rooms.
"""
