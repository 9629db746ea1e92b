# A deployment of chatd on AWS for users of Terraform or OpenTofu: the stack of ../stack.yaml, with its parameters as variables.
# docs/deploy.md describes what it lacks beside scripts/deploy.

resource "aws_cloudformation_stack" "chatd" {
  name          = var.stack_name
  template_body = file("${path.module}/../stack.yaml")
  capabilities  = ["CAPABILITY_IAM"]
  iam_role_arn  = var.iam_role_arn
  tags          = var.tags

  # With ROLLBACK the failed stack would stay, and prevent_destroy would keep the next apply from replacing it.
  on_failure = "DELETE"

  # All of them, because CloudFormation uses the default for a parameter that an update does not name.
  parameters = {
    ImageId                = var.image_id
    InstanceType           = var.instance_type
    SecondInstanceType     = var.second_instance_type
    ThirdInstanceType      = var.third_instance_type
    MinSize                = var.min_size
    MaxSize                = var.max_size
    ConnectionsPerInstance = var.connections_per_instance
    SoakSeconds            = var.soak_seconds
    CertificateArn         = var.certificate_arn
    DomainName             = var.domain_name
    HostedZoneId           = var.hosted_zone_id
    ClientCidr             = var.client_cidr
    Origins                = var.origins
    Retain                 = var.retain
    StoreParameter         = var.store_parameter
    StoreKeyArn            = var.store_key_arn
    StorePort              = var.store_port
    StoreNodeType          = var.store_node_type
    StoreReplicas          = var.store_replicas
    SnapshotName           = var.snapshot_name
    VpcId                  = var.vpc_id
    SubnetIds              = var.subnet_ids
    NodeSubnetIds          = var.node_subnet_ids
    VpcCidr                = var.vpc_cidr
    ZoneA                  = var.zone_a
    ZoneB                  = var.zone_b
    AccessLogBucket        = var.access_log_bucket
    WebAclArn              = var.web_acl_arn
    PermissionsBoundaryArn = var.permissions_boundary_arn
    AlarmTopicArn          = var.alarm_topic_arn
    LogDays                = var.log_days
  }

  # Long enough for a rollout with the longest SoakSeconds and for its rollback.  After a time-out CloudFormation continues.
  timeouts {
    create = "1h"
    update = "6h"
  }

  lifecycle {
    # A deletion leaves the MemoryDB, and the network with it.  `scripts/deploy destroy` deletes everything, with a snapshot.
    prevent_destroy = true

    # An imported stack has none, and a change of it replaces the stack.
    ignore_changes = [on_failure]

    # The rules of the template.  CloudFormation checks them too, but not before an apply.
    precondition {
      condition     = var.certificate_arn == "" || var.domain_name != ""
      error_message = "Give domain_name with certificate_arn, because clients check the name in the certificate"
    }

    precondition {
      condition     = var.hosted_zone_id == "" || var.domain_name != ""
      error_message = "Give domain_name with hosted_zone_id"
    }

    precondition {
      condition     = var.vpc_id == "" || var.subnet_ids != ""
      error_message = "Give subnet_ids with vpc_id"
    }

    precondition {
      condition     = var.subnet_ids == "" || var.vpc_id != ""
      error_message = "Give vpc_id with subnet_ids"
    }

    precondition {
      condition     = var.node_subnet_ids == "" || var.vpc_id != ""
      error_message = "Give vpc_id with node_subnet_ids"
    }

    precondition {
      condition     = var.snapshot_name == "" || var.store_parameter == ""
      error_message = "Give no snapshot_name with store_parameter, because no store is created"
    }

    precondition {
      condition     = var.third_instance_type == "" || var.second_instance_type != ""
      error_message = "Give second_instance_type with third_instance_type"
    }

    precondition {
      condition     = (var.zone_a == "" && var.zone_b == "") || (var.zone_a != "" && var.zone_b != "")
      error_message = "Give both zone_a and zone_b, or neither"
    }

    precondition {
      condition     = (var.zone_a == "" && var.zone_b == "") || var.zone_a != var.zone_b
      error_message = "Give two different zones"
    }

    precondition {
      condition     = (var.zone_a == "" && var.zone_b == "") || var.vpc_id == ""
      error_message = "Give no zones with vpc_id, whose subnets have theirs"
    }

    precondition {
      condition     = var.store_key_arn == "" || var.store_parameter != ""
      error_message = "Give store_parameter with store_key_arn, which is the key of that parameter"
    }
  }
}
