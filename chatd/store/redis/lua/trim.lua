-- Remove what is retained no longer, in rooms where nothing is posted too.
--
-- KEYS: the log, the heads, the feed, and the streams of some rooms
-- ARGV: how many messages are kept, and the age in microseconds up to which they are (0: all); how many entries
--       the feed keeps; the time, if not this machine's; the rooms' names
-- Answers: the number in the feed after which all of that has been told

local keep, age, feed, given = unpack(ARGV)
local log = redis.call('HMGET', LOG, 'epoch', 'stamped')
local now = time(given, log[2])
local oldest = tonumber(age) > 0 and now - tonumber(age) or 0
for index = 4, #KEYS do
    local room = ARGV[index + 1]
    if trim(KEYS[index], tonumber(keep), oldest) then
        local head = tonumber(redis.call('HGET', HEADS, room) or 0)
        tell(feed, now, log[1], 'r', room, 'f', text(first(KEYS[index], head)))
    end
end
return tonumber(redis.call('HGET', LOG, 'seq'))
