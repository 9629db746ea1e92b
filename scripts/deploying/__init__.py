"""The parts of scripts/deploy.  The account holds all state, so every command can be interrupted and run again.

- aws.py: calls to AWS, whose errors are one line with the remedy
- stack.py: the current state of the stack, and the change set for another image
- check.py: the problems that would stop a stack or a rollout, each with its remedy
- rollout.py: watching and cancelling the execution of a change set
- destroy.py: the removal of a stack, which keeps a snapshot of its messages
- verify.py: the check that all instances run the image and serve
- record.py: the record of verified images
- images.py: the images, and the removal of old ones
- ship.py: the pipeline from an image to a verified rollout, and back
- prove.py: the proof, which calls all of these on a stack of its own at AWS
- recording.py: what AWS answers to the proof, for the tests to replay
- stack.yaml: the CloudFormation template
- role.yaml: the role that CloudFormation may assume for it
"""
