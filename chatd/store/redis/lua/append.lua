-- Number, stamp and keep a message, and tell of it in the feed; all of that, or nothing.
--
-- KEYS: the log, the heads, the feed, the room's stream, the label's key (the log's if there is no label)
-- ARGV: the epoch that is known, and the number of the newest entry of the feed that is known; the room, the username,
--       the message; its digest ('' if there is no label), and how long the label is remembered, in milliseconds;
--       how many messages are kept, and the age in microseconds up to which they are (0: all); how many entries the
--       feed keeps; the time, if not this machine's
-- Answers: the message's number and the number in the feed after which it has been told; and, if the label
--          was there before, whether it was that of the same message (1 or 0).
--          Nothing, if the log is another than the one that is known.

local epoch, seen, room, username, message, digest, remember, keep, age, feed, given = unpack(ARGV)
local stream, label = KEYS[4], KEYS[5]

local log = redis.call('HMGET', LOG, 'epoch', 'seq', 'stamped')
if log[1] ~= epoch or tonumber(log[2]) < tonumber(seen) then
    return {}
end

if digest ~= '' then
    local kept = redis.call('GET', label)
    local oldest = kept and redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    if oldest then
        local number, said = string.match(kept, '^(%d+) (%x+)$')
        if tonumber(number) >= parts(oldest[1]) then -- else the message is gone, and its label with it
            return { tonumber(number), tonumber(log[2]), said == digest and 1 or 0 }
        end
    end
end

-- Nothing is undone: see first whether all can be written.
redis.call('XLEN', stream)
redis.call('XLEN', FEED)

local now = time(given, log[3])
local number = redis.call('HINCRBY', HEADS, room, 1)
redis.call('XADD', stream, text(number) .. '-' .. text(now), 'u', username, 'm', message)
if digest ~= '' then
    redis.call('SET', label, text(number) .. ' ' .. digest, 'PX', remember)
end
keep, age = tonumber(keep), tonumber(age)
local oldest = age > 0 and now - age or 0
if (keep > 0 or age > 0) and trim(stream, keep, oldest) then
    local f = text(first(stream, number))
    return { number, tell(feed, now, epoch, 'r', room, 'n', text(number), 'u', username, 'm', message, 'f', f) }
end
return { number, tell(feed, now, epoch, 'r', room, 'n', text(number), 'u', username, 'm', message) }
