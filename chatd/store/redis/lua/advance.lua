-- Move cursors of a reader outside, unless another claim followed that of the node.
--
-- KEYS: the log, the heads, the feed, the reader's cursors
-- ARGV: the epoch, as the node knows it; the word of its claim; and rooms and numbers in turn
-- Returns: 1, or 0 if the claim is over or the log has another epoch.

local epoch, word = unpack(ARGV, 1, 2)
if redis.call('HGET', LOG, 'epoch') ~= epoch or redis.call('HGET', KEYS[4], '#word') ~= word then
    return 0
end
for index = 3, #ARGV, 2 do
    redis.call('HSET', KEYS[4], ARGV[index], ARGV[index + 1])
end
return 1
