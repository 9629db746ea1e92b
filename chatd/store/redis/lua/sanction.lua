-- Store or remove sanctions, and announce each change in the feed: all of it or nothing.
--
-- KEYS: the log, the heads, the feed, the sanctions
-- ARGV: the epoch, and the number of the newest entry of the feed, as the node knows them; about how many entries the
--       feed keeps; the time in microseconds ('': this machine's); and for each sanction its id and its JSON ('' to
--       remove it)
-- Returns: the number of the feed's newest entry.  Nothing if the log is not the one that the node knows.

local epoch, seen, feed, given = unpack(ARGV)
local log = redis.call('HMGET', LOG, 'epoch', 'seq')
if log[1] ~= epoch or tonumber(log[2]) < tonumber(seen) or tonumber(log[2]) ~= newest(FEED) then
    return {}
end
local seq = tonumber(log[2])
local now = time(given, 0)
for index = 5, #ARGV, 2 do
    local word, json = ARGV[index], ARGV[index + 1]
    local known = redis.call('HGET', KEYS[4], word)
    if json ~= '' then
        redis.call('HSET', KEYS[4], word, json)
    elseif known then
        redis.call('HDEL', KEYS[4], word)
    end
    if json ~= '' or known then
        -- Older versions read the room of every entry.
        seq = announce(feed, now, epoch, seq, 'r', '', 's', word, 'v', json)
    end
end
return { seq }
