-- What the scripts have in common; each is sent with this before it.
--
-- {chatd}:log       hash: epoch, written, readable_since; seq, the number of the feed's newest entry; stamped, its time
-- {chatd}:heads     hash: the number of the newest message of each room, which stays when that is trimmed
-- {chatd}:room:NAME stream: the messages of a room, under N-MICROSECONDS, N being 1, 2, 3 ... without gaps
-- {chatd}:feed      stream: what happened in all rooms, in one order, under SEQ-MICROSECONDS
-- {chatd}:label:SHA string: the number of the message that has this label, and what was said
--
-- The time is in each id, so that an entry which was lost and another that took its number are told apart.

local LOG, HEADS, FEED = KEYS[1], KEYS[2], KEYS[3]

-- Numbers as they are: Lua itself writes large ones with an exponent.
local function text(number)
    return string.format('%.0f', number)
end

-- The time in microseconds, which never goes back; `given` stands for the clock's if it is not empty.
local function time(given, stamped)
    local now = tonumber(given)
    if not now then
        local parts = redis.call('TIME')
        now = parts[1] * 1000000 + parts[2]
    end
    return math.max(now, tonumber(stamped) or 0)
end

-- The number, and the time, of an entry.
local function parts(id)
    local number, micros = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(number), tonumber(micros)
end

-- The number of the oldest message that a room keeps.
local function first(stream, head)
    local entry = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    return entry and parts(entry[1]) or head + 1
end

-- Tell of something in the feed, which keeps about `keep` entries; answers its number there.  Each entry names the
-- epoch, so that whoever reads on where the feed went back notices.
local function tell(keep, micros, epoch, ...)
    local seq = redis.call('HINCRBY', LOG, 'seq', 1)
    redis.call('HSET', LOG, 'stamped', text(micros))
    redis.call('XADD', FEED, 'MAXLEN', '~', keep, text(seq) .. '-' .. text(micros), 'e', epoch, ...)
    return seq
end

-- Remove what is retained no longer: all but the newest `keep` messages, and those from before `oldest`, in
-- microseconds; 0: all are kept.  Answers whether any was removed.
local function trim(stream, keep, oldest)
    local removed = 0
    if keep > 0 then
        removed = redis.call('XTRIM', stream, 'MAXLEN', keep)
    end
    while oldest > 0 do
        local entries = redis.call('XRANGE', stream, '-', '+', 'COUNT', 100)
        local kept
        for _, entry in ipairs(entries) do
            local number, micros = parts(entry[1])
            if micros >= oldest then
                kept = number
                break
            end
        end
        if kept then
            return removed + redis.call('XTRIM', stream, 'MINID', text(kept)) > 0
        elseif #entries == 0 then
            break
        end
        removed = removed + redis.call('XTRIM', stream, 'MINID', text(parts(entries[#entries][1]) + 1))
    end
    return removed > 0
end
