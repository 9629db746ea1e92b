-- Remove what is no longer retained, including in rooms that receive no posts.
--
-- KEYS: the log, the heads, the feed, and the streams of some rooms
-- ARGV: the epoch, as the node knows it; how many messages are kept (0: all); the times in microseconds of the oldest
--       and the newest message whose age keeps it (0: no age removes any); about how many entries the feed keeps; the
--       time in microseconds ('': this machine's); the rooms' names
-- Returns: the number of the feed's newest entry, which follows every announcement of this script (0 if the log is
--          not the one that the node knows); how many messages were removed; and, for each room that could not be
--          trimmed, its name and the error.

local epoch, keep, oldest, youngest, feed, given = unpack(ARGV)
local log = redis.call('HMGET', LOG, 'epoch', 'seq')
if log[1] ~= epoch then
    return { 0, 0 }
end
local seq = tonumber(log[2])
local now = time(given, 0)
local total = 0
local failed = {}
local function tidy(room, stream)
    if redis.call('EXISTS', edits(room)) == 1 then
        forget(edits(room), first(stream, tonumber(redis.call('HGET', HEADS, room) or 0)))
    end
end
for index = 4, #KEYS do
    local room = ARGV[index + 3]
    local good, removed = pcall(trim, KEYS[index], tonumber(keep), tonumber(oldest), tonumber(youngest), true)
    if not good then
        table.insert(failed, room)
        table.insert(failed, type(removed) == 'table' and removed.err or removed) -- Redis 6.2 gives the text
    elseif removed > 0 then
        total = total + removed
        local head = tonumber(redis.call('HGET', HEADS, room) or 0)
        seq = announce(feed, now, epoch, seq, 'r', room, 'f', text(first(KEYS[index], head)))
    end
    if good then
        tidy(room, KEYS[index])
    end
end
return { seq, total, unpack(failed) }
