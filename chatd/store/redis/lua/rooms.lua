-- Summarize some rooms.
--
-- KEYS: the log, the heads, the feed, and the streams of the rooms
-- ARGV: the most messages of a room to sample; the rooms' names
-- Returns: for each room the numbers of the oldest message kept and of the newest ever appended; how many of the newest
--          messages were sampled, and their bytes; and the newest message, without which the room holds none.

local found = {}
for index = 4, #KEYS do
    local entries = redis.call('XREVRANGE', KEYS[index], '+', '-', 'COUNT', ARGV[1])
    local bytes = 0
    for _, entry in ipairs(entries) do
        bytes = bytes + #entry[2][2] + #entry[2][4] + #(fields(entry).j or '')
    end
    local number = tonumber(redis.call('HGET', HEADS, ARGV[index - 2]) or 0)
    table.insert(found, { first(KEYS[index], number), number, #entries, bytes, entries[1] })
end
return found
