# The outputs of ../stack.yaml.  A test compares the two files.

output "web_socket_url" {
  description = "The URL that clients connect to."
  value       = aws_cloudformation_stack.chatd.outputs["WebSocketURL"]
}

output "encryption" {
  description = "The encryption of client connections."
  value       = aws_cloudformation_stack.chatd.outputs["Encryption"]
}

output "balancer_name" {
  description = "The name that domain_name must point to, by a CNAME or an alias."
  value       = aws_cloudformation_stack.chatd.outputs["BalancerName"]
}

output "auto_scaling_group" {
  description = "The name of the group."
  value       = aws_cloudformation_stack.chatd.outputs["AutoScalingGroup"]
}

output "target_group" {
  description = "The ARN of the target group."
  value       = aws_cloudformation_stack.chatd.outputs["TargetGroup"]
}

output "rollout_alarm" {
  description = "The ARN of the alarm that rolls back a rollout. It is on while one of RolloutAlarms is."
  value       = aws_cloudformation_stack.chatd.outputs["RolloutAlarm"]
}

output "rollout_alarms" {
  description = "The alarms that must be OK before and during a rollout, separated by commas."
  value       = aws_cloudformation_stack.chatd.outputs["RolloutAlarms"]
}

output "log_group" {
  description = "The log group of the instances."
  value       = aws_cloudformation_stack.chatd.outputs["LogGroup"]
}
