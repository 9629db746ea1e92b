-- Claim a reader outside for one node, renew that claim, or end it.
--
-- KEYS: the log, the heads, the feed, the reader's lease and its cursors
-- ARGV: the epoch, as the node knows it; the word of the claim; how many milliseconds it lasts (0: end it); 1 to renew it
-- Returns: 1 if the node has the reader; 2 if it does, and the reader is new, so that it has no cursors yet; and
--          otherwise 0.

local epoch, word, lasting, renews = unpack(ARGV)
local lease, cursors = KEYS[4], KEYS[5]
local holder = redis.call('GET', lease)
if lasting == '0' then
    if holder == word then
        redis.call('DEL', lease)
    end
    return 0
end
if redis.call('HGET', LOG, 'epoch') ~= epoch or holder and holder ~= word or renews == '1' and not holder then
    return 0
end
redis.call('SET', lease, word, 'PX', lasting)
if renews == '1' then
    return 1
end
local known = redis.call('HGET', cursors, '#epoch')
if known and known ~= epoch then
    redis.call('DEL', cursors) -- these numbers stand for other messages
    redis.call('HSET', cursors, '#epoch', epoch)
end
redis.call('HSET', cursors, '#word', word)
return known and 1 or 2
