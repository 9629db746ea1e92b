-- Number, stamp and store a message, and announce it in the feed: all of it or nothing.
--
-- KEYS: the log, the heads, the feed, the room's stream, the label's key (the log's if there is no label)
-- ARGV: the epoch, and the number of the newest entry of the feed, as the node knows them; the room; the username;
--       the message; its digest ('' if there is no label); how many milliseconds the label is remembered;
--       how many messages are kept (0: all); the times in microseconds of the oldest and the newest message whose age
--       keeps it (0: no age removes any); about how many entries the feed keeps; the time in microseconds ('': this
--       machine's)
-- Returns: the message's number, the number of the feed's entry that announces it, and how many messages were removed.
--          If the label was used before, also whether it was for the same message (1 or 0).
--          Nothing if the log is not the one that the node knows.

-- Return the number and the digest that a label names; nothing if its message was trimmed or lost.
local function find(stream, kept, username, head)
    local oldest = kept and redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    if not oldest then
        return nil
    end
    local number, digest = string.match(kept, '^(%d+) (%x+)$')
    number = tonumber(number)
    if number < parts(oldest[1]) or number > head then
        return nil
    end
    local entry = redis.call('XRANGE', stream, number, number)[1]
    if entry then
        local _, writer, _, message = unpack(entry[2])
        local _, length = string.gsub(message, '[^\128-\191]', '') -- in characters, as keys.digest counts them
        if writer ~= username or redis.sha1hex(length .. ':' .. message) ~= digest then
            return nil -- another message has its number
        end
    end
    return number, digest
end

local epoch, seen, room, username, message, digest, remember, keep, oldest, youngest, feed, given =
    unpack(ARGV)
local stream, label = KEYS[4], KEYS[5]

local log = redis.call('HMGET', LOG, 'epoch', 'seq')
if log[1] ~= epoch or tonumber(log[2]) < tonumber(seen) then
    return {}
end

local number, last = head(room, stream)
if not number or tonumber(log[2]) ~= newest(FEED) then
    return {}
end

if digest ~= '' then
    local used, said = find(stream, redis.call('GET', label), username, number)
    if used then
        return { used, tonumber(log[2]), 0, said == digest and 1 or 0 }
    end
end

local now = time(given, last)
if number == 0 and redis.call('EXISTS', stream) == 1 then
    redis.call('DEL', stream) -- an empty stream does not take numbers again
end
number = number + 1
redis.call('HSET', HEADS, room, text(number))
redis.call('XADD', stream, text(number) .. '-' .. text(now), 'u', username, 'm', message)
if digest ~= '' then
    redis.call('SET', label, text(number) .. ' ' .. digest, 'PX', remember)
end
local removed = trim(stream, tonumber(keep), tonumber(oldest), tonumber(youngest), false)
local change = { 'r', room, 'n', text(number), 'u', username, 'm', message }
if removed > 0 then
    table.insert(change, 'f')
    table.insert(change, text(first(stream, number)))
end
return { number, announce(feed, now, epoch, tonumber(log[2]), unpack(change)), removed }
