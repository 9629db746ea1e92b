-- Read a page of a room, in one instant.
--
-- KEYS: the log, the heads, the feed, the room's stream
-- ARGV: the room; the number after which to read ('' for the newest); the most entries to return
-- Returns: the epoch; the number of the feed's newest entry; the numbers of the oldest message kept and of the newest
--          ever appended; and the entries, oldest first (but newest first if the newest were requested).
--          Nothing if the log has lost the room.

local room, after, limit = unpack(ARGV)
local stream = KEYS[4]
local number = head(room, stream)
if not number then
    return {}
end
local entries
if after == '' then
    entries = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', limit)
else
    entries = redis.call('XRANGE', stream, text(tonumber(after) + 1), '+', 'COUNT', limit)
end
local log = redis.call('HMGET', LOG, 'epoch', 'seq')
return { log[1], log[2], first(stream, number), number, entries }
