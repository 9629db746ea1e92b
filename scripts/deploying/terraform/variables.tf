# The parameters of ../stack.yaml, with the same defaults and constraints.  A test compares the two files.

variable "image_id" {
  type        = string
  description = "The image of chatd, made by scripts/bake. A new image starts a rollout."
  nullable    = false

  validation {
    condition     = can(regex("^(?:ami-[0-9a-f]{8,17})$", var.image_id))
    error_message = "image_id must be the id of an image such as ami-0123456789abcdef0"
  }
}

variable "instance_type" {
  type        = string
  description = "Instance type. It must have the architecture of the image (t4g and c8g are arm64)."
  default     = "t4g.small"
  nullable    = false

  validation {
    condition     = can(regex("^(?:[a-z][a-z0-9-]*\\.[a-z0-9]+)$", var.instance_type))
    error_message = "instance_type must be an instance type such as t4g.small, of the architecture of the image"
  }
}

variable "second_instance_type" {
  type        = string
  description = "Instance type to launch if EC2 has no capacity for instance_type. Empty - none."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:([a-z][a-z0-9-]*\\.[a-z0-9]+)?)$", var.second_instance_type))
    error_message = "second_instance_type must be an instance type such as t4g.medium, of the architecture of the image, or empty"
  }
}

variable "third_instance_type" {
  type        = string
  description = "Instance type to launch if EC2 has no capacity for the other two. Empty - none."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:([a-z][a-z0-9-]*\\.[a-z0-9]+)?)$", var.third_instance_type))
    error_message = "third_instance_type must be an instance type such as c7g.medium, of the architecture of the image, or empty"
  }
}

variable "min_size" {
  type        = number
  description = "Smallest number of instances."
  default     = 2
  nullable    = false

  validation {
    condition     = var.min_size >= 1 && var.min_size <= 100
    error_message = "min_size must be 1 to 100; with 1 the loss of the instance is an outage of some minutes"
  }
}

variable "max_size" {
  type        = number
  description = "Largest number of instances; it limits the costs."
  default     = 6
  nullable    = false

  validation {
    condition     = var.max_size >= 1 && var.max_size <= 100
    error_message = "max_size must be 1 to 100, and not less than min_size"
  }
}

variable "connections_per_instance" {
  type        = number
  description = "Target for the average number of connections per instance. The group scales to meet it."
  default     = 5000
  nullable    = false

  validation {
    condition     = var.connections_per_instance >= 10 && var.connections_per_instance <= 500000
    error_message = "connections_per_instance must be 10 to 500000"
  }
}

variable "soak_seconds" {
  type        = number
  description = "Time in seconds that a rollout watches the alarms after its first instances, and after its last."
  default     = 300
  nullable    = false

  validation {
    condition     = var.soak_seconds >= 60 && var.soak_seconds <= 3600
    error_message = "soak_seconds must be 60 to 3600"
  }
}

variable "certificate_arn" {
  type        = string
  description = "The certificate for wss:// on port 443. Empty - unencrypted ws:// on port 8085."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(arn:aws[a-z-]*:acm:[a-z0-9-]+:[0-9]{12}:certificate/[0-9a-f-]+)?)$", var.certificate_arn))
    error_message = "certificate_arn must be the ARN of a certificate in ACM, of this region, or empty"
  }
}

variable "domain_name" {
  type        = string
  description = "The host name that clients use, as in the certificate. Required with a certificate."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:([a-z0-9]([a-z0-9-]*[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+)?)$", var.domain_name))
    error_message = "domain_name must be a name such as chat.example.com, or empty"
  }
}

variable "hosted_zone_id" {
  type        = string
  description = "The hosted zone in which the stack creates domain_name. Empty - point the name at the load balancer yourself."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(Z[A-Z0-9]{1,31})?)$", var.hosted_zone_id))
    error_message = "hosted_zone_id must be the id of a hosted zone of Route 53 such as Z0123456789ABCDEFGHIJ, or empty"
  }
}

variable "client_cidr" {
  type        = string
  description = "The range of addresses that clients may connect from."
  default     = "0.0.0.0/0"
  nullable    = false

  validation {
    condition     = can(regex("^(?:[0-9]{1,3}(\\.[0-9]{1,3}){3}/[0-9]{1,2})$", var.client_cidr))
    error_message = "client_cidr must be a range of IPv4 addresses such as 192.0.2.0/24"
  }
}

variable "origins" {
  type        = string
  description = "Web origins that may connect, as --origin of chatd, separated by spaces. Empty - pages of the same host."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:[!-~ ]{0,500})$", var.origins))
    error_message = "origins must be patterns for --origin, separated by spaces, such as https://chat.example.com, or empty"
  }
}

variable "retain" {
  type        = string
  description = "Messages or days that a room retains, as --retain of chatd. The store holds them in memory."
  default     = "10000"
  nullable    = false

  validation {
    condition     = can(regex("^(?:all|[1-9][0-9]{0,8}d?)$", var.retain))
    error_message = "retain must be a number of messages such as 10000, of days such as 30d, or all"
  }
}

variable "store_parameter" {
  type        = string
  description = "The SSM parameter with the URL of an existing Redis or Valkey. Empty - create a MemoryDB."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:((/[A-Za-z0-9_.-]+)+)?)$", var.store_parameter))
    error_message = "store_parameter must be the full name of an SSM parameter, such as /chatd/store, or empty"
  }
}

variable "store_key_arn" {
  type        = string
  description = "The customer managed key that encrypts store_parameter. Empty - the AWS managed key of SSM."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/(mrk-)?[0-9a-f-]+)?)$", var.store_key_arn))
    error_message = "store_key_arn must be the ARN of a key in KMS, or empty"
  }
}

variable "store_port" {
  type        = number
  description = "The port of the store."
  default     = 6379
  nullable    = false

  validation {
    condition     = var.store_port >= 1 && var.store_port <= 65535
    error_message = "store_port must be 1 to 65535"
  }
}

variable "store_node_type" {
  type        = string
  description = "Node type of the created MemoryDB. Its memory limits the messages of all rooms."
  default     = "db.t4g.small"
  nullable    = false

  validation {
    condition     = can(regex("^(?:db\\.[a-z0-9]+\\.[a-z0-9]+)$", var.store_node_type))
    error_message = "store_node_type must be a MemoryDB node type such as db.t4g.small"
  }
}

variable "store_replicas" {
  type        = number
  description = "Number of replicas of the created MemoryDB, for failover."
  default     = 1
  nullable    = false

  validation {
    condition     = var.store_replicas >= 0 && var.store_replicas <= 5
    error_message = "store_replicas must be 0 to 5; with 0 the loss of a node is an outage of some minutes, without loss of messages"
  }
}

variable "snapshot_name" {
  type        = string
  description = "A snapshot of MemoryDB to create the store from. It cannot be changed later. Empty - an empty store."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:([a-z][a-z0-9.-]{0,254})?)$", var.snapshot_name))
    error_message = "snapshot_name must be the name of a snapshot of MemoryDB, or empty"
  }
}

variable "vpc_id" {
  type        = string
  description = "An existing VPC. Empty - create one with two public subnets."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(vpc-[0-9a-f]{8,17})?)$", var.vpc_id))
    error_message = "vpc_id must be the id of a VPC, or empty"
  }
}

variable "subnet_ids" {
  type        = string
  description = "Public subnets of vpc_id for the load balancer, in at least two zones. Required with vpc_id."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(subnet-[0-9a-f]{8,17}(,subnet-[0-9a-f]{8,17})+)?)$", var.subnet_ids))
    error_message = "subnet_ids must be the ids of two subnets or more, separated by commas, or empty"
  }
}

variable "node_subnet_ids" {
  type        = string
  description = "Private subnets of vpc_id, with a route to AWS, for instances and store. Empty - subnet_ids."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(subnet-[0-9a-f]{8,17}(,subnet-[0-9a-f]{8,17})+)?)$", var.node_subnet_ids))
    error_message = "node_subnet_ids must be the ids of two subnets or more, separated by commas, or empty"
  }
}

variable "vpc_cidr" {
  type        = string
  description = "The range of addresses of the created VPC."
  default     = "10.85.0.0/16"
  nullable    = false

  validation {
    condition     = can(regex("^(?:[0-9]{1,3}(\\.[0-9]{1,3}){3}/(1[6-9]|2[0-4]))$", var.vpc_cidr))
    error_message = "vpc_cidr must be a range of IPv4 addresses from /16 to /24"
  }
}

variable "zone_a" {
  type        = string
  description = "The first zone of the created VPC. Empty - the first zone of the region, which may lack MemoryDB."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:([a-z]{2}(-[a-z]+)+-[0-9][a-z])?)$", var.zone_a))
    error_message = "zone_a must be a zone such as us-east-1a, or empty"
  }
}

variable "zone_b" {
  type        = string
  description = "The second zone of the created VPC, another than zone_a. Required with zone_a."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:([a-z]{2}(-[a-z]+)+-[0-9][a-z])?)$", var.zone_b))
    error_message = "zone_b must be a zone such as us-east-1b, or empty"
  }
}

variable "access_log_bucket" {
  type        = string
  description = "The bucket of this region for the access log of the load balancer, whose policy permits that. Empty - no access log."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])?)$", var.access_log_bucket))
    error_message = "access_log_bucket must be the name of a bucket in S3, or empty"
  }
}

variable "web_acl_arn" {
  type        = string
  description = "The web ACL of WAF that filters requests to the load balancer. Empty - none."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(arn:aws[a-z-]*:wafv2:[a-z0-9-]+:[0-9]{12}:regional/webacl/[A-Za-z0-9_-]{1,128}/[0-9a-f-]+)?)$", var.web_acl_arn))
    error_message = "web_acl_arn must be the ARN of a regional web ACL of WAF, or empty"
  }
}

variable "permissions_boundary_arn" {
  type        = string
  description = "The permissions boundary of the role of the instances. Empty - none."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(arn:aws[a-z-]*:iam::([0-9]{12}|aws):policy/[!-~]{1,512})?)$", var.permissions_boundary_arn))
    error_message = "permissions_boundary_arn must be the ARN of a policy in IAM, or empty"
  }
}

variable "alarm_topic_arn" {
  type        = string
  description = "The topic that receives alarms. Empty - no notification; alarms still stop rollouts."
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^(?:(arn:aws[a-z-]*:sns:[a-z0-9-]+:[0-9]{12}:[A-Za-z0-9_-]{1,256})?)$", var.alarm_topic_arn))
    error_message = "alarm_topic_arn must be the ARN of a topic in SNS, or empty"
  }
}

variable "log_days" {
  type        = number
  description = "Number of days that logs are retained."
  default     = 30
  nullable    = false

  validation {
    condition     = contains([1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288], var.log_days)
    error_message = "log_days must be a number of days that CloudWatch Logs supports, such as 30"
  }
}

# The stack itself.

variable "stack_name" {
  type        = string
  description = "Name of the stack, and so of its group, its store, its log and its alarms."
  default     = "chatd"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z](-?[a-z0-9])*$", var.stack_name)) && length(var.stack_name) <= 32
    error_message = "stack_name must have at most 32 lower-case letters, digits and single hyphens, and begin with a letter"
  }
}

variable "iam_role_arn" {
  type        = string
  description = "ARN of the role that CloudFormation acts as, such as that of ../role.yaml. Null - your credentials."
  default     = null
}

variable "tags" {
  type        = map(string)
  description = "Tags of the stack and its resources."
  default     = {}
  nullable    = false
}
