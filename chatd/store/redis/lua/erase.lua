-- Erase what was removed from a room: replace its stream by a copy without those texts, one piece at a time.
--
-- Redis keeps the bytes of a deleted entry until all entries in the same node of the stream are deleted.  An entry cannot
-- be changed in its place either.  Only a new stream is free of the text, in memory and in what Redis saves.
--
-- {chatd}:copy:EPOCH:NAME stream: the first part of the copy; it expires if nobody continues it
--
-- KEYS: the log, the heads, the feed, the room's stream, the room's copy
-- ARGV: the epoch, as the node knows it; the room; the most entries to copy now; the most entries that the feed keeps;
--       how many milliseconds an unfinished copy is kept
-- Returns: 1 if the room is done, and otherwise 0.  The feed then holds no text from before the removal either.

local epoch, room, piece, keep, lasting = unpack(ARGV)
local stream, copy = KEYS[4], KEYS[5]
local changes = edits(room)

-- Append an entry to a copy, under its id.
local function add(key, entry)
    redis.call('XADD', key, entry[1], unpack(entry[2]))
end

-- Replace the feed by a copy of its newest entries, from a number on.
local function shorten(from)
    local last = newest(FEED)
    local fresh = copy .. ':feed'
    redis.call('DEL', fresh)
    local start = text(math.max(from, last - tonumber(keep) + 1))
    for _, entry in ipairs(redis.call('XRANGE', FEED, start, '+')) do
        add(fresh, entry)
    end
    redis.call('RENAME', fresh, FEED)
end

if redis.call('HGET', LOG, 'epoch') ~= epoch then
    return 1 -- the next session looks again
end
local seq = redis.call('HGET', ERASE, room)
if not seq then
    return 1
end
local done, head = newest(copy), newest(stream)
local begun = redis.call('HGET', changes, 'copied') -- the removal with which the copy began
if not begun or done == 0 or done > head then
    redis.call('DEL', copy)
    redis.call('HSET', changes, 'copied', seq)
    begun, done = seq, 0
end
for _, entry in ipairs(redis.call('XRANGE', stream, text(done + 1), '+', 'COUNT', piece)) do
    done = parts(entry[1])
    if redis.call('HGET', changes, 'x' .. text(done)) and not fields(entry).x then
        entry[2][4] = '[removed]' -- after u, its value, and m
        for index = #entry[2] - 1, 1, -2 do
            if entry[2][index] == 'j' then
                table.remove(entry[2], index)
                table.remove(entry[2], index)
            end
        end
        table.insert(entry[2], 'x')
        table.insert(entry[2], ERASED)
    end
    add(copy, entry)
end
redis.call('PEXPIRE', copy, lasting)
if done < head then
    return 0
end
local oldest = first(stream, head)
if oldest <= head then
    redis.call('XTRIM', copy, 'MINID', text(oldest))
    redis.call('RENAME', copy, stream)
    redis.call('PERSIST', stream)
end
redis.call('HDEL', changes, 'copied')
forget(changes, oldest)
for index, field in ipairs(redis.call('HGETALL', changes)) do
    local number = index % 2 == 1 and string.match(field, '^x(%d+)$')
    if number and fields(redis.call('XRANGE', stream, number, number)[1]).x then
        redis.call('HDEL', changes, field)
    end
end
shorten(tonumber(begun))
if begun ~= seq then -- something was removed since the copy began
    return 0
end
redis.call('HDEL', ERASE, room)
return 1
