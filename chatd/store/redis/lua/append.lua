-- Number, stamp and store a message, and announce it in the feed: all of it or nothing.
--
-- KEYS: the log, the heads, the feed, the room's stream, the label's key (the log's if there is no label)
-- ARGV: the epoch, and the number of the newest entry of the feed, as the node knows them; the room; the username;
--       the message; its digest ('' if there is no label); how many milliseconds the label is remembered;
--       how many messages are kept (0: all); the times in microseconds of the oldest and the newest message whose age
--       keeps it (0: no age removes any); about how many entries the feed keeps; the time in microseconds ('': this
--       machine's); the author ('' if there is none); the id of the message to replace ('' if there is none);
--       1 for a removal, and 1 for a moderator (otherwise ''); the operator's own fields as JSON ('' without any)
-- Returns: the message's number, the number of the feed's entry that announces it, and how many messages were removed.
--          If the label was used before, also whether it was for the same message (1 or 0).
--          Nothing if the log is not the one that the node knows.
--          0 and a reason if the message may not be replaced: 1 it belongs to another author, 2 it is unknown, 3 it is
--          an edit or was removed.

-- Return one of the texts that keys.digest joins, after its length in characters.
local function part(words)
    local _, length = string.gsub(words, '[^\128-\191]', '')
    return length .. ':' .. words
end

-- Return the number that a label names, and 1 if the post repeats its message, otherwise 0; nothing if the message was
-- trimmed or lost.  `is_retry` of chatd/store/base.py states the rule.
local function find(stream, changes, kept, head, username, digest, target, removes)
    local oldest = kept and redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    if not oldest then
        return nil
    end
    local number, stored = string.match(kept, '^(%d+) (%x+)$')
    if tonumber(number) < parts(oldest[1]) or tonumber(number) > head then
        return nil
    end
    local same = stored == digest
    local entry = redis.call('XRANGE', stream, number, number)[1]
    if entry then
        local found = fields(entry)
        local said = part(found.m) .. (found.p and part(found.p) or '') .. (found.j and part(found.j) or '')
        local whole = redis.sha1hex(said) == stored
        if found.u ~= username or not (whole or found.x) then
            return nil -- another message has its number
        end
        local removal = whole and found.p and found.x == REMOVAL
        local erased = found.x and not removal or redis.call('HGET', changes, 'x' .. number)
        same = found.p == target and not removal == (removes == '') and (erased or same)
    end
    return tonumber(number), same and 1 or 0
end

-- Return why a message may not be replaced, as above; nothing if it may be.
local function refusal(stream, changes, number, author, moderated)
    local entry = redis.call('XRANGE', stream, number, number)[1]
    local found = entry and fields(entry)
    if moderated == '' and (author == '' or (found and found.a ~= author)) then
        return 1
    elseif not found then
        return 2
    elseif found.p or found.x or redis.call('HGET', changes, 'x' .. number) then
        return 3
    end
end

local epoch, seen, room, username, message, digest, remember, keep, oldest, youngest, feed, given, author, replaces,
    removes, moderated, extra = unpack(ARGV)
local changes = edits(room)
local of, target = string.match(replaces, '^(%w+)-(%d+)$')
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
    local used, same = find(stream, changes, redis.call('GET', label), number, username, digest, target, removes)
    if used then
        return { used, tonumber(log[2]), 0, same }
    end
end

if target then
    local known = of == epoch and target or 0 -- no message has the number 0
    local reason = refusal(stream, changes, known, author, moderated)
    if reason then
        return { 0, reason }
    end
end

local now = time(given, last)
if number == 0 and redis.call('EXISTS', stream) == 1 then
    redis.call('DEL', stream) -- an empty stream does not take numbers again
end
number = number + 1
redis.call('HSET', HEADS, room, text(number))
local entry = { 'u', username, 'm', message }
if author ~= '' then
    table.insert(entry, 'a')
    table.insert(entry, author)
end
if target then
    local earlier = redis.call('HGET', changes, target)
    redis.call('HSET', changes, target, (earlier and earlier .. ' ' or '') .. text(number))
    table.insert(entry, 'p')
    table.insert(entry, target)
    if removes ~= '' then
        table.insert(entry, 'x')
        table.insert(entry, REMOVAL)
        redis.call('HSET', changes, 'x' .. target, '')
        for edit in string.gmatch(earlier or '', '%d+') do
            redis.call('HSET', changes, 'x' .. edit, '')
        end
    end
end
if extra ~= '' then
    table.insert(entry, 'j')
    table.insert(entry, extra)
end
redis.call('XADD', stream, text(number) .. '-' .. text(now), unpack(entry))
if digest ~= '' then
    redis.call('SET', label, text(number) .. ' ' .. digest, 'PX', remember)
end
local removed = trim(stream, tonumber(keep), tonumber(oldest), tonumber(youngest), false)
local change = { 'r', room, 'n', text(number), unpack(entry) }
if removed > 0 then
    table.insert(change, 'f')
    table.insert(change, text(first(stream, number)))
end
local announced = announce(feed, now, epoch, tonumber(log[2]), unpack(change))
if removes ~= '' then
    redis.call('HSET', ERASE, room, text(announced))
end
return { number, announced, removed }
