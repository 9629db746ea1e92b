-- Open the log: create it if it does not exist, and check that it is still the one that the node knows.
--
-- KEYS: the log, the heads, the feed, the room of the seed
-- ARGV: an epoch that no log had; the format of the node's code; the oldest format that reads what it writes;
--       the epoch, and the newest entry of the feed, as the node knows them ('' and '0-0' at first);
--       the seed: for each message its username, text, timestamp, and the timestamp in microseconds
-- Returns: the epoch, which is the new one if the log has lost the known entry; readable_since; written; and the
--          newest entry of the feed.

local fresh, format, readable, known, seen = unpack(ARGV)
local epoch = redis.call('HGET', LOG, 'epoch')
-- Redis does not roll back: first check that every key can be written.
redis.call('HLEN', HEADS)
redis.call('XLEN', FEED)

if not epoch then
    epoch = fresh
    local count, micros = 0, 0
    for argument = 6, #ARGV, 4 do
        local username, message, timestamp = unpack(ARGV, argument, argument + 2)
        micros = math.max(tonumber(ARGV[argument + 3]), micros)
        count = count + 1
        redis.call('XADD', KEYS[4], text(count) .. '-' .. text(micros), 'u', username, 'm', message, 't', timestamp)
    end
    if count > 0 then
        redis.call('HSET', HEADS, 'main', count)
    end
    redis.call('HSET', LOG, 'epoch', epoch, 'written', format, 'readable_since', readable, 'seq', 0,
        'stamped', text(micros))
end

if epoch == known and seen ~= '0-0' and #redis.call('XRANGE', FEED, seen, seen) == 0 then
    -- Either the feed has dropped it together with all older entries, or it was lost and its number was reused.
    local oldest = redis.call('XRANGE', FEED, '-', '+', 'COUNT', 1)[1]
    if not oldest or parts(oldest[1]) <= parts(seen) then
        epoch = fresh
        redis.call('HSET', LOG, 'epoch', epoch)
    end
end

local written = math.max(tonumber(redis.call('HGET', LOG, 'written')), tonumber(format))
-- Always write, so that a replica refuses.
redis.call('HSET', LOG, 'written', written)
local newest = redis.call('XREVRANGE', FEED, '+', '-', 'COUNT', 1)[1]
return { epoch, redis.call('HGET', LOG, 'readable_since'), text(written), newest and newest[1] or '0-0' }
