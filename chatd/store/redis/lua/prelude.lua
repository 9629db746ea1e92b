-- The code that the scripts share; it precedes each script.
--
-- {chatd}:log       hash: epoch, written, readable_since; seq, the number of the feed's newest entry; stamped, its time.
--                   While it is created, only seeding, the digest of the seed.  Without an epoch it has lost something,
--                   and lost names the key.
-- {chatd}:heads     hash: the number of the newest message of each room, which stays when that message is trimmed
-- {chatd}:room:NAME stream: the messages of a room, with ids N-MICROSECONDS; N is 1, 2, 3 ... without gaps
-- {chatd}:edits:NAME hash: for a message that was edited, the numbers of its edits, oldest first; and for one that was
--                   removed, `x` and its number: its text must not be shown, and `erase` removes it from the stream
-- {chatd}:erase     hash: the rooms whose streams still hold a removed text, each with the number of the feed's entry that
--                   announces the newest removal
-- {chatd}:feed      stream: the changes of all rooms, in one order, with ids SEQ-MICROSECONDS
-- {chatd}:sanctions hash: the JSON of each sanction, by its id
-- {chatd}:lease:READER string: the word of the node that reads for a reader outside, such as a webhook; it expires
-- {chatd}:cursors:READER hash: the number of the last message delivered to that reader, by room; `#epoch`, the epoch of
--                   these numbers; and `#word`, the word of the newest lease.  No room has such a name.
-- {chatd}:label:SHA string: the number of the message that has this label, and the digest of its text
--
-- Each id contains the time, so that a lost entry differs from the one that reuses its number.

local LOG, HEADS, FEED = KEYS[1], KEYS[2], KEYS[3]
local ERASE = '{chatd}:erase'
local REMOVAL, ERASED = '1', '2' -- older versions write REMOVAL for both
local JUMP = 60 * 1000000 -- JUMP_SECONDS of chatd/store/base.py, in microseconds

-- Format a number in full: Lua itself writes large ones with an exponent.
local function text(number)
    return string.format('%.0f', number)
end

-- Return the time in microseconds; `given`, if not empty, replaces the clock.  After a small step back of the clock,
-- the time stays at `last`, that of the message before, until the clock reaches it.  After a jump it follows the clock.
local function time(given, last)
    local now = tonumber(given)
    if not now then
        local parts = redis.call('TIME')
        now = parts[1] * 1000000 + parts[2]
    end
    return now < last and last <= now + JUMP and last or now
end

-- Return the number and the time in an entry's id.
local function parts(id)
    local number, micros = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(number), tonumber(micros)
end

-- Return the key of what was edited in a room.
local function edits(room)
    return '{chatd}:edits:' .. room
end

-- Return the fields of an entry by name: u the username, m the text, t the timestamp of a seeded message, a the author,
-- p the number that an edit replaces, x REMOVAL or, for what one erased, ERASED, j the operator's own fields as JSON.
local function fields(entry)
    local found = {}
    for index = 1, #entry[2], 2 do
        found[entry[2][index]] = entry[2][index + 1]
    end
    return found
end

-- Forget what was edited before a number, because those messages were trimmed.
local function forget(changes, oldest)
    for index, field in ipairs(redis.call('HGETALL', changes)) do
        local number = index % 2 == 1 and string.match(field, '^x?(%d+)$')
        if number and tonumber(number) < oldest then
            redis.call('HDEL', changes, field)
        end
    end
end

-- Return the number and the time of a stream's newest entry; 0 and 0 without one.
local function newest(stream)
    local entry = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
    if entry then
        return parts(entry[1])
    end
    return 0, 0
end

-- Return the number of the oldest message that a room keeps.
local function first(stream, head)
    local entry = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    return entry and parts(entry[1]) or head + 1
end

-- Return the number of the newest message of a room, 0 without one, and its time, 0 if it was trimmed.  If the log has
-- lost the message, return nothing: then the next `open` draws another epoch.
local function head(room, stream)
    local number = redis.call('HGET', HEADS, room)
    if not number and redis.call('EXISTS', HEADS) == 0 then
        return nil
    end
    local kept, micros = newest(stream)
    number = math.max(tonumber(number or 0), kept) -- the heads may have been lost
    if kept > 0 or number == 0 or redis.call('EXISTS', stream) == 1 then
        return number, micros
    end
    redis.call('HDEL', LOG, 'epoch') -- first, because Redis accepts it also when memory is full
    redis.call('HSET', LOG, 'lost', stream)
    -- The numbers go on, so that no label of a lost message matches another one.
    redis.call('XADD', stream, text(number) .. '-0', 'u', '', 'm', '')
    redis.call('XTRIM', stream, 'MAXLEN', 0)
end

-- Append the entry that follows `seq` to the feed, which keeps about `keep` entries; return its number.  Each entry
-- names the epoch, so that nodes notice a feed that went back.
local function announce(keep, micros, epoch, seq, ...)
    seq = seq + 1
    redis.call('HSET', LOG, 'seq', text(seq), 'stamped', text(micros))
    redis.call('XADD', FEED, 'MAXLEN', '~', keep, text(seq) .. '-' .. text(micros), 'e', epoch, ...)
    return seq
end

-- Remove all but the newest `keep` messages, and those from before `oldest` in microseconds; 0 keeps all.
-- A message from after `newest` has a timestamp of a wrong clock: it is removed only before another one that is too old.
-- If there are many of these, only a `patient` caller looks behind them.  Return how many messages were removed.
local function trim(stream, keep, oldest, newest, patient)
    local removed = 0
    if keep > 0 then
        removed = redis.call('XTRIM', stream, 'MAXLEN', keep)
    end
    local old, from = nil, '-'
    while oldest > 0 do
        local entries = redis.call('XRANGE', stream, from, '+', 'COUNT', 100)
        local young, before = false, old
        for _, entry in ipairs(entries) do
            local number, micros = parts(entry[1])
            if micros < oldest then
                old = number
            elseif micros <= newest then
                young = true
                break
            end
        end
        if young or #entries == 0 or not patient and old == before then
            break
        end
        from = text(parts(entries[#entries][1]) + 1)
    end
    if old then
        removed = removed + redis.call('XTRIM', stream, 'MINID', text(old + 1))
    end
    return removed
end
