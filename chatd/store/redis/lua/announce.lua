-- Publish this node's occupancy of a room, and the users that type there.
--
-- {chatd}:here:ROOM hash: the occupancy of the room by node
-- {chatd}:node:NODE string: exists while the node is alive
-- {chatd}:presence  stream: the latest changes
--
-- KEYS: the stream, the room's hash, the node's key
-- ARGV: the node; the room; its occupancy ('' if the room is empty); the users that type ('' if there are none);
--       how many milliseconds the node counts as alive; about how many entries the stream keeps; how many milliseconds
--       the hash is kept; '' if the other nodes need not learn of an occupancy that has not changed
-- Returns: 1 if the node's key was missing, so that the other nodes may have dropped it, and otherwise 0; the newest
--          entry of the stream; and each other live node and its occupancy of the room, in turn.

local node, room, here, typing, live, keep, lasting, again = unpack(ARGV)
local alive = redis.call('SET', KEYS[3], '1', 'PX', live, 'GET')
local before = redis.call('HGET', KEYS[2], node) or ''
if here == '' then
    redis.call('HDEL', KEYS[2], node)
else
    redis.call('HSET', KEYS[2], node, here)
end
if again ~= '' or here ~= before or typing ~= '' or not alive then
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', keep, '*', 'n', node, 'r', room, 'h', here, 't', typing)
end
redis.pcall('PEXPIRE', KEYS[2], lasting) -- a user with the permissions of an older version may not
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local others = { alive and 0 or 1, newest and newest[1] or '0-0' }
local all = redis.call('HGETALL', KEYS[2])
for index = 1, #all, 2 do
    if all[index] ~= node then
        if redis.call('EXISTS', '{chatd}:node:' .. all[index]) == 1 then
            table.insert(others, all[index])
            table.insert(others, all[index + 1])
        else
            redis.call('HDEL', KEYS[2], all[index])
        end
    end
end
return others
