-- Tell the other nodes who is in a room at this one, and who types there.
--
-- {chatd}:here:ROOM hash: by node, who is there
-- {chatd}:node:NODE string: there for as long as the node lives
-- {chatd}:presence  stream: what nodes have told lately
--
-- KEYS: the stream, the room's hash, the node's key
-- ARGV: the node, the room, who is there ('' if nobody), who types ('' if nobody), how long the node is taken to live
--       if it says no more, in milliseconds; about how many entries the stream keeps
-- Answers: by turns, each other node that lives and who is there.

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
