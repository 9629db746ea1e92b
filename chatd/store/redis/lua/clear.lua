-- Remove all messages of a room, whose numbers go on.
--
-- KEYS: the log, the heads, the feed, the room's stream
-- ARGV: the epoch, as the node knows it; the room; about how many entries the feed keeps; the time in microseconds
--       ('': this machine's)
-- Returns: the number of the feed's newest entry, and how many messages were removed.  Nothing if the log is not the
--          one that the node knows, or has lost the room.

local epoch, room, feed, given = unpack(ARGV)
local stream = KEYS[4]
local log = redis.call('HMGET', LOG, 'epoch', 'seq')
local number = log[1] == epoch and head(room, stream)
if not number then
    return {}
end
local seq = tonumber(log[2])
local removed = redis.call('XTRIM', stream, 'MAXLEN', 0) -- first, because Redis accepts it also when memory is full
if removed > 0 then
    seq = announce(feed, time(given, 0), epoch, seq, 'r', room, 'f', text(number + 1))
end
return { seq, removed }
