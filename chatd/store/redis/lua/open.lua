-- Open the log: create it if it does not exist, and draw another epoch if it has lost something.
--
-- KEYS: the log, the heads, the feed, the room of the seed
-- ARGV: an epoch that no log had; the format of the node's code; the oldest format that reads what it writes;
--       the epoch, and the newest entry of the feed, as the node knows them ('' and '0-0' at first);
--       the seed's digest and its number of messages; how many messages precede the given ones; and the given
--       messages: for each its username, text, timestamp, own fields of the operator ('' without any), and the
--       timestamp in microseconds
-- Returns: the epoch; readable_since; written; the newest entry of the feed; what the log had lost ('' if nothing);
--          and why Redis refuses to write ('' if it writes).
--          Only the number of stored messages, if the log is new and needs those of the seed that follow.

local fresh, format, readable, known, seen, digest, total, skipped = unpack(ARGV, 1, 8)
local room = KEYS[4]
local log = redis.call('HMGET', LOG, 'epoch', 'written', 'readable_since', 'seq', 'stamped', 'seeding', 'lost')
local epoch, seeding = log[1], log[6]
local seq, micros = newest(FEED)
local heads = redis.call('HLEN', HEADS)
local lost = ''

if log[3] and tonumber(log[3]) > tonumber(format) then
    return { epoch or '', log[3], log[2], '0-0', '', '' } -- the node cannot tell what is missing here
end

if not epoch and (seeding or redis.call('EXISTS', LOG, HEADS, FEED, room) == 0) then
    if seeding and seeding ~= digest then -- by a node with another seed, which did not finish
        redis.call('DEL', room)
    end
    local count = redis.call('XLEN', room)
    if count > 0 then
        micros = select(2, newest(room))
    end
    if count < tonumber(total) then
        if tonumber(skipped) ~= count or #ARGV == 8 then
            return { count }
        end
        for argument = 9, #ARGV, 5 do
            local username, message, timestamp, extra = unpack(ARGV, argument, argument + 3)
            micros = math.max(tonumber(ARGV[argument + 4]), micros)
            count = count + 1
            local entry = { 'u', username, 'm', message, 't', timestamp }
            if extra ~= '' then
                table.insert(entry, 'j')
                table.insert(entry, extra)
            end
            redis.call('XADD', room, text(count) .. '-' .. text(micros), unpack(entry))
        end
        if count < tonumber(total) then
            redis.call('HSET', LOG, 'seeding', digest)
            return { count }
        end
    end
    epoch, log[2], log[3] = fresh, format, readable
    redis.call('HSET', HEADS, 'main', count)
    redis.call('HSET', LOG, 'epoch', epoch, 'written', format, 'readable_since', readable, 'seq', 0,
        'stamped', text(micros))
    redis.call('HDEL', LOG, 'seeding')
    micros = 0
elseif not epoch then
    lost = log[7] or LOG
elseif heads == 0 then
    lost = HEADS
elseif tonumber(log[4] or -1) ~= seq then
    lost = FEED
elseif epoch == known and seen ~= '0-0' and #redis.call('XRANGE', FEED, seen, seen) == 0 then
    -- Either the feed has dropped it together with all older entries, or it was lost and its number was reused.
    local oldest = redis.call('XRANGE', FEED, '-', '+', 'COUNT', 1)[1]
    if not oldest or parts(oldest[1]) <= parts(seen) then
        lost = 'messages'
    end
end

if lost ~= '' then
    local kept = heads == 0 and newest(room) -- read it before the first write, because Redis does not roll back
    epoch, log[3] = fresh, log[3] or readable
    redis.call('HDEL', LOG, 'epoch', 'lost') -- first, because Redis accepts it also when memory is full
    redis.call('HSET', LOG, 'epoch', epoch, 'written', log[2] or format, 'readable_since', log[3], 'seq', text(seq),
        'stamped', text(math.max(micros, tonumber(log[5] or 0))))
    if kept then -- the other rooms recover theirs from their messages
        redis.call('HSET', HEADS, 'main', text(kept))
    end
    if seq == 0 then
        redis.call('DEL', FEED) -- an empty stream does not take numbers again
    end
end

local written = text(math.max(tonumber(log[2] or 0), tonumber(format)))
-- Always write, so that a replica refuses.
local refused = redis.pcall('HSET', LOG, 'written', written)
return { epoch, log[3], written, text(seq) .. '-' .. text(micros), lost, type(refused) == 'table' and refused.err or '' }
