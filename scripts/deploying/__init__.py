"""What scripts/deploy does: the account holds all state, so that each command can be cut off and run again.

aws.py      the account: calls, and errors in one line with the remedy
stack.py    the stack as it is now, and the change set that would have it launch another image
rollout.py  a change set under way: what is seen of it, and how it is called off
verify.py   whether what runs is the image, and serves; echo.py is the client that tries
record.py   which image is known to be good
images.py   the images, and which of them may go
ship.py     the road of an image through all that, and back
"""
