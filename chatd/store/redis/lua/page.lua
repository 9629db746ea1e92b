-- Read a page of a room, in one instant.
--
-- KEYS: the log, the heads, the feed, the room's stream
-- ARGV: the room; the number after which to read ('' for the newest); the most entries to return
-- Returns: the epoch; the number of the feed's newest entry; the numbers of the oldest message kept and of the newest
--          ever appended; and the entries, oldest first (but newest first if the newest were requested).
--          Nothing if the log has lost the room.  A message that was edited has the text of its newest edit, and in the
--          field d its number; what was removed has the field x, and its field j has no meaning.

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
local changes = edits(room)
if redis.call('EXISTS', changes) == 1 then
    for _, entry in ipairs(entries) do
        local key = text(parts(entry[1]))
        local numbers, removed = unpack(redis.call('HMGET', changes, key, 'x' .. key))
        if numbers then
            local newest = string.match(numbers, '%d+$')
            local edit = redis.call('XRANGE', stream, newest, newest)[1]
            entry[2][4] = edit[2][4] -- after u, its value, and m
            table.insert(entry[2], 'j') -- the last of equal fields counts
            table.insert(entry[2], fields(edit).j or '')
            table.insert(entry[2], 'd')
            table.insert(entry[2], newest)
        end
        if removed then
            entry[2][4] = '[removed]'
            table.insert(entry[2], 'x')
            table.insert(entry[2], '1')
        end
    end
end
local log = redis.call('HMGET', LOG, 'epoch', 'seq')
return { log[1], log[2], first(stream, number), number, entries }
