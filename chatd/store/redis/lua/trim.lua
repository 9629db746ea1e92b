-- Remove what is no longer retained, including in rooms that receive no posts.
--
-- KEYS: the log, the heads, the feed, and the streams of some rooms
-- ARGV: the epoch, as the node knows it; how many messages are kept (0: all); up to which age in microseconds
--       (0: all); about how many entries the feed keeps; the time in microseconds ('': this machine's); the
--       rooms' names
-- Returns: the number of the feed's newest entry, which follows every announcement of this script; 0 if the log is
--          not the one that the node knows.

local epoch, keep, age, feed, given = unpack(ARGV)
local log = redis.call('HMGET', LOG, 'epoch', 'stamped')
if log[1] ~= epoch then
    return 0
end
local now = time(given, log[2])
local oldest = tonumber(age) > 0 and now - tonumber(age) or 0
for index = 4, #KEYS do
    local room = ARGV[index + 2]
    if trim(KEYS[index], tonumber(keep), oldest) then
        local head = tonumber(redis.call('HGET', HEADS, room) or 0)
        announce(feed, now, epoch, 'r', room, 'f', text(first(KEYS[index], head)))
    end
end
return tonumber(redis.call('HGET', LOG, 'seq'))
