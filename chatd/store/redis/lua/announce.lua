-- Publish this node's occupancy of a room, and the users that type there.
--
-- {chatd}:here:ROOM hash: the occupancy of the room by node
-- {chatd}:node:NODE string: exists while the node is alive
-- {chatd}:presence  stream: the latest changes
--
-- KEYS: the stream, the room's hash, the node's key
-- ARGV: the node; the room; its occupancy ('' if the room is empty); the users that type ('' if there are none);
--       how many milliseconds the node counts as alive; about how many entries the stream keeps
-- Returns: each other live node and its occupancy of the room, in turn.

local node, room, here, typing, live, keep = unpack(ARGV)
redis.call('SET', KEYS[3], '1', 'PX', live)
if here == '' then
    redis.call('HDEL', KEYS[2], node)
else
    redis.call('HSET', KEYS[2], node, here)
end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', keep, '*', 'n', node, 'r', room, 'h', here, 't', typing)
local others = {}
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
