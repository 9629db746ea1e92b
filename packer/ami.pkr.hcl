# The image of chatd for arm64 and amd64.  scripts/bake sets the variables and runs Packer; see docs/image.md.

packer {
  required_version = ">= 1.15"
  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = "~> 1.8"
    }
  }
}

variable "version" {
  type        = string
  description = "The version of chatd."
}

variable "git_sha" {
  type        = string
  description = "The commit of the wheel."
}

variable "built" {
  type        = string
  description = "The time of the bake, as 2026-01-01T00:00:00Z."
}

variable "bundle" {
  type        = string
  description = "The folder with the bundles arm64.tar and amd64.tar."
}

variable "manifest" {
  type        = string
  description = "The file that receives the ids of the images."
}

variable "region" {
  type    = string
  default = null
}

variable "subnet_id" {
  type        = string
  default     = null
  description = "The subnet of the builder; by default one of the default VPC."
}

variable "ssh_from" {
  type        = list(string)
  default     = null
  description = "The ranges that may connect to the builder; by default the public address of this machine."
}

variable "session_profile" {
  type        = string
  default     = null
  description = "The instance profile of a builder without a public address, which is reached through Session Manager."
}

variable "kms_key_id" {
  type        = string
  default     = null
  description = "The KMS key that encrypts the image; by default the account's default key of EBS."
}

variable "deprecate_days" {
  type        = number
  default     = 90
  description = "The days after which EC2 marks the image as deprecated, but still starts it; 0: never."
  validation {
    condition     = var.deprecate_days >= 0 && var.deprecate_days <= 3650 && floor(var.deprecate_days) == var.deprecate_days
    error_message = "The days must be a whole number from 0 to 3650, because EC2 accepts at most ten years."
  }
}

variable "agents" {
  type = map(list(object({
    url    = string
    sha256 = string
  })))
  default     = {}
  description = "The Debian packages of the SSM and CloudWatch agents, by architecture."
  validation {
    condition     = length([for agent in flatten(values(var.agents)) : agent if !can(regex("^[0-9a-f]{64}$", agent.sha256))]) == 0
    error_message = "Each agent needs the SHA-256 of its package, in 64 hexadecimal digits."
  }
  validation {
    condition     = length([for agent in flatten(values(var.agents)) : agent if !can(regex("^(https|file)://[^\\s'\"]+$", agent.url))]) == 0
    error_message = "Each agent needs an https: URL."
  }
}

variable "rehearsal" {
  type = object({
    ssh_host = string
    ssh_port = number
  })
  default     = null
  description = "Only for tests without an account: the address of the machine that replaces the builder."
}

locals {
  session = var.session_profile != null
  # At its first boot such a builder installs the SSM agent.
  install = { for name, agents in var.agents : name => join("\n", [
    "#!/bin/sh",
    "AGENT='${join("", [for agent in agents : "${agent.sha256} ${agent.url}" if can(regex("/amazon-ssm-agent[^/]*$", agent.url))])}'",
    file("${path.root}/session.sh"),
  ]) }
  stamp = formatdate("YYYYMMDD-hhmmss", var.built)
  tags = {
    Name               = "chatd-${var.version}"
    "chatd:version"    = var.version
    "chatd:git-sha"    = var.git_sha
    "chatd:base-image" = "{{ .SourceAMI }}"
    "chatd:base-name"  = "{{ .SourceAMIName }}"
    "chatd:built"      = var.built
  }
}

source "amazon-ebs" "chatd" {
  region    = var.region
  subnet_id = var.subnet_id

  # The builder requires a token for its metadata.  Its disk is encrypted, and so is the snapshot of the disk.  With
  # `encrypt_boot`, Packer would copy the image once more.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  launch_block_device_mappings {
    device_name           = "/dev/xvda"
    volume_type           = "gp3"
    volume_size           = 8
    encrypted             = true
    kms_key_id            = var.kms_key_id
    delete_on_termination = true
  }
  shutdown_behavior                         = "terminate"
  temporary_key_pair_type                   = "ed25519"
  temporary_security_group_source_cidrs     = var.ssh_from
  temporary_security_group_source_public_ip = var.ssh_from == null && !local.session

  communicator = "ssh"
  ssh_username = "admin"
  ssh_timeout  = "10m"

  ssh_interface               = local.session ? "session_manager" : null
  iam_instance_profile        = var.session_profile
  associate_public_ip_address = local.session ? false : null

  # The image requires the same of its instances.
  imds_support = "v2.0"
  ena_support  = true
  deprecate_at = var.deprecate_days == 0 ? null : timeadd(var.built, "${24 * var.deprecate_days}h")

  # The image and its snapshot get the tags of the builder when they are created.  So the role may create no tags later.
  run_tags        = local.tags
  run_volume_tags = local.tags

  ssh_host                = var.rehearsal == null || local.session ? null : var.rehearsal.ssh_host
  ssh_port                = var.rehearsal == null || local.session ? 22 : var.rehearsal.ssh_port
  skip_region_validation  = var.rehearsal != null
  skip_metadata_api_check = var.rehearsal != null
}

build {
  source "amazon-ebs.chatd" {
    name          = "arm64"
    instance_type = "t4g.small"
    ami_name      = "chatd-${var.version}-arm64-${local.stamp}"
    user_data     = local.session ? local.install.arm64 : null
    source_ami_filter {
      filters = {
        name                = "debian-13-arm64-*"
        architecture        = "arm64"
        virtualization-type = "hvm"
      }
      owners      = ["136693071363"] # Debian's
      most_recent = true
    }
  }

  source "amazon-ebs.chatd" {
    name          = "amd64"
    instance_type = "t3.small"
    ami_name      = "chatd-${var.version}-amd64-${local.stamp}"
    user_data     = local.session ? local.install.amd64 : null
    source_ami_filter {
      filters = {
        name                = "debian-13-amd64-*"
        architecture        = "x86_64"
        virtualization-type = "hvm"
      }
      owners      = ["136693071363"]
      most_recent = true
    }
  }

  provisioner "shell" {
    script            = "${path.root}/upgrade.sh"
    execute_command   = "chmod +x {{ .Path }}; sudo env {{ .Vars }} {{ .Path }}"
    expect_disconnect = true # it ends with a reboot
    skip_clean        = true
  }

  provisioner "shell" {
    inline      = ["[ ! -e /run/chatd-upgrading ] || { sleep 2; exit 1; }"]
    max_retries = 60 # until it has rebooted
  }

  provisioner "file" {
    source      = "${var.bundle}/${source.name}.tar"
    destination = "/tmp/bundle.tar"
  }

  provisioner "shell" {
    script          = "${path.root}/provision.sh"
    execute_command = "chmod +x {{ .Path }}; sudo env {{ .Vars }} {{ .Path }}"
    environment_vars = [
      "AGENTS=${join(" ", [for agent in lookup(var.agents, source.name, []) : "${agent.sha256} ${agent.url}"])}",
    ]
  }

  post-processor "manifest" {
    output = var.manifest
    custom_data = {
      architecture = source.name
    }
  }
}
