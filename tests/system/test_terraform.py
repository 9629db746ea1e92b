"""scripts/deploying/terraform: the module has the parameters, the rules and the outputs of the template, and fits it.

No test here runs Terraform or OpenTofu, because its build takes minutes: python-hcl2 parses the module.
"""

import re

import pytest
from support import terraform_rules
from support.needs import ROOT
from support.stacks import TEMPLATE, mutant
from support.stacks import template as read

STACK_CODE = ROOT / "scripts" / "deploying" / "stack.py"


@pytest.fixture(scope="module")
def template():
    return read()


def capabilities():
    """Return the capabilities that scripts/deploy gives to CloudFormation."""
    (found,) = re.findall(r'Capabilities=\["(\w+)"\]', STACK_CODE.read_text())
    return [found]


def faults(template, **changed):
    """Return the faults of the module, with the text of some files changed."""
    return terraform_rules.faults(terraform_rules.texts() | changed, template, capabilities())


def test_module_follows_the_template(template):
    """Variables, parameters, preconditions and outputs are those of the template, both ways."""
    assert faults(template) == []
    assert {*terraform_rules.texts()} == {"main.tf", "outputs.tf", "variables.tf", "versions.tf"}


def test_template_fits_into_a_request():
    """The module gives the text of the template to CloudFormation, which limits it; a larger one must lie in S3."""
    text = TEMPLATE.read_text("utf-8")
    assert not terraform_rules.oversized(text)
    assert terraform_rules.oversized(text + "#" * (terraform_rules.LARGEST + 1 - len(text.encode())))
    assert not terraform_rules.oversized(text + "#" * (terraform_rules.LARGEST - len(text.encode())))
    assert f"LARGEST: Final = {terraform_rules.LARGEST}" in STACK_CODE.read_text()


CHANGES = {
    "a variable less": ("variables.tf", 'variable "log_days"', 'variable "days"', "variable log_days: it is missing"),
    "a variable more": (
        "variables.tf",
        'variable "tags"',
        'variable "labels"',
        "variable labels: the template has none",
    ),
    "a variable of its own less": ("variables.tf", 'variable "tags"', 'variable "x"', "variable tags: it is missing"),
    "a variable twice": ("variables.tf", 'variable "zone_b"', 'variable "zone_a"', "variable zone_a: it occurs twice"),
    "a type": ("variables.tf", "= number", "= string", "variable min_size: type is 'string', not 'number'"),
    "a default": ("variables.tf", "= 5000\n", "= 500\n", "variable connections_per_instance: default is 500, not 5000"),
    "a default as text": ("variables.tf", '"10000"', "10000", "variable retain: default is 10000, not '10000'"),
    "null": ("variables.tf", "  nullable    = false\n", "", "variable image_id: nullable is None, not False"),
    "words": (
        "variables.tf",
        "Smallest number",
        "Number",
        "variable min_size: description is 'Number of instances.', not",
    ),
    "a pattern": ("variables.tf", "vpc-[0-9a-f]{8,17}", "vpc-.*", "variable vpc_id: validation is"),
    "a limit": ("variables.tf", "var.max_size <= 100", "var.max_size <= 200", "variable max_size: validation is"),
    "allowed values": ("variables.tf", "[1, 3, 5,", "[1, 3,", "variable log_days: validation is"),
    "the form of an image": ("variables.tf", "ami-[0-9a-f]{8,17}", ".*", "variable image_id: validation is"),
    "an output less": ("outputs.tf", 'output "log_group"', 'output "log"', "output log_group: it is missing"),
    "an output more": ("outputs.tf", 'output "log_group"', 'output "log"', "output log: the template has none"),
    "the value of an output": ("outputs.tf", '["Encryption"]', '["LogGroup"]', "output encryption: value is"),
    "a parameter less": ("main.tf", "    ZoneA                  = var.zone_a\n", "", "parameter ZoneA is None"),
    "a parameter more": (
        "main.tf",
        "    ZoneA  ",
        "    ZoneC = 1\n    ZoneA  ",
        "parameter ZoneC: the template has none",
    ),
    "parameters exchanged": ("main.tf", "= var.zone_b", "= var.zone_a", "parameter ZoneB is ${var.zone_a}"),
    "another template": (
        "main.tf",
        "/../stack.yaml",
        "/../role.yaml",
        'template_body is ${file("${path.module}/../role.yaml")}',
    ),
    "more capabilities": (
        "main.tf",
        "CAPABILITY_IAM",
        "CAPABILITY_NAMED_IAM",
        "capabilities are ['CAPABILITY_NAMED_IAM'], not",
    ),
    "another role": ("main.tf", "= var.iam_role_arn", "= null", "iam_role_arn is None"),
    "no tags": ("main.tf", "  tags          = var.tags\n", "", "the resource has no tags"),
    "an argument more": (
        "main.tf",
        "  on_failure",
        "  disable_rollback = true\n  on_failure",
        "the resource has disable_rollback",
    ),
    "a failed stack that stays": ("main.tf", '"DELETE"', '"ROLLBACK"', "on_failure is ROLLBACK"),
    "a short wait": ("main.tf", '"6h"', '"2h"', "the time-outs are too short"),
    "a short creation": ("main.tf", '    create = "1h"\n', "", "the time-outs are too short"),
    "a stack that goes": ("main.tf", "prevent_destroy = true", "prevent_destroy = false", "the stack can be destroyed"),
    "an import": ("main.tf", "[on_failure]", "[]", "an imported stack would be replaced"),
    "a precondition less": (
        "main.tf",
        'var.store_key_arn == "" || var.store_parameter != ""',
        "true",
        'precondition missing: ${var.store_key_arn == "" || var.store_parameter != ""}',
    ),
    "a precondition more": (
        "main.tf",
        'var.vpc_id == "" || var.subnet_ids',
        'var.vpc_id == "x" || var.subnet_ids',
        'precondition without a rule: ${var.vpc_id == "x"',
    ),
    "another resource": ("main.tf", '"chatd" {', '"other" {', "the module has other resources than the stack"),
}


@pytest.mark.parametrize(("name", "old", "new", "fault"), CHANGES.values(), ids=CHANGES)
def test_change_of_the_module_is_found(template, name, old, new, fault):
    text = terraform_rules.texts()[name]
    assert old in text
    found = faults(template, **{name: text.replace(old, new, 1)})
    assert [line for line in found if line.startswith(fault)], found


TEMPLATE_CHANGES = {
    "a parameter": (
        lambda t: t["Parameters"].update(New={"Type": "String", "Description": "New."}),
        "variable new: it is missing",
    ),
    "no parameter": (lambda t: t["Parameters"].pop("WebAclArn"), "variable web_acl_arn: the template has none"),
    "a limit": (lambda t: t["Parameters"]["MaxSize"].update(MaxValue=9), "variable max_size: validation is"),
    "a pattern": (lambda t: t["Parameters"]["Retain"].update(AllowedPattern="all"), "variable retain: validation is"),
    "a default": (lambda t: t["Parameters"]["LogDays"].update(Default=7), "variable log_days: default is 30, not 7"),
    "no default": (lambda t: t["Parameters"]["ZoneA"].pop("Default"), "variable zone_a: default is '', not None"),
    "a longer rollout": (lambda t: t["Parameters"]["SoakSeconds"].update(MaxValue=7200), "the time-outs are too short"),
    "a rule": (lambda t: t["Rules"].pop("TlsNeedsAName"), "precondition without a rule: "),
    "words of a rule": (
        lambda t: t["Rules"]["AVpcNeedsSubnets"]["Assertions"][0].update(AssertDescription="Give both"),
        "precondition missing: ",
    ),
    "an output": (
        lambda t: t["Outputs"].update(New={"Description": "New.", "Value": "1"}),
        "output new: it is missing",
    ),
    "no output": (lambda t: t["Outputs"].pop("LogGroup"), "output log_group: the template has none"),
}


@pytest.mark.parametrize(("change", "fault"), TEMPLATE_CHANGES.values(), ids=TEMPLATE_CHANGES)
def test_change_of_the_template_is_found(template, change, fault):
    found = faults(mutant(template, change))
    assert [line for line in found if line.startswith(fault)], found


PAGE = ROOT / "docs" / "deploy.md"


def test_example_fits_the_module():
    assert terraform_rules.example_faults(PAGE.read_text("utf-8"), terraform_rules.texts()) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("  domain_name     =", "  domain =", "there is no variable domain"),
        ("  image_id        =", "  tags =", "variable image_id is missing"),
        ("deploying/terraform?ref", "deploying?ref", "the source is another folder"),
        ("module.chatd.web_socket_url", "module.chatd.url", "there is no output url"),
    ],
)
def test_fault_of_the_example_is_found(old, new, fault):
    text = PAGE.read_text("utf-8")
    assert old in text
    assert terraform_rules.example_faults(text.replace(old, new), terraform_rules.texts()) == [fault]
