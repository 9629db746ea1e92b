"""Rules for scripts/deploying/terraform; `faults` lists those that the module breaks.

The variables, the preconditions and the outputs follow from scripts/deploying/stack.yaml, so a change of one alone is a
fault.
"""

import functools
import json
import re

import hcl2
from support.needs import ROOT

MODULE = ROOT / "scripts" / "deploying" / "terraform"
OWN = {"stack_name", "iam_role_arn", "tags"}
"""The variables that are no parameters of the template."""
TYPES = {"String": "string", "Number": "number", "AWS::EC2::Image::Id": "string"}
PATTERNS = {"AWS::EC2::Image::Id": "ami-[0-9a-f]{8,17}"}
"""The patterns that CloudFormation requires for values of these types."""
FORMS = {"AWS::EC2::Image::Id": "must be the id of an image such as ami-0123456789abcdef0"}
LARGEST = 51200
"""The largest template outside S3, in bytes."""
HOUR = 3600
TEMPLATE_BODY = '${file("${path.module}/../stack.yaml")}'
LITERALS = {
    "template_body": TEMPLATE_BODY,
    "name": "${var.stack_name}",
    "iam_role_arn": "${var.iam_role_arn}",
    "tags": "${var.tags}",
    "on_failure": "DELETE",
}
"""Arguments of the resource with one right value."""
ARGUMENTS = {*LITERALS, "capabilities", "parameters", "timeouts", "lifecycle"}


# Reading


def plain(value):
    """Return a value of the parser without the quotes of its strings, comments and marks of blocks."""
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items() if not key.startswith("__")}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return json.loads(value) if isinstance(value, str) and value.startswith('"') else value


@functools.cache
def parsed(block):
    """Return a block at the top of a file; cached, because the tests change one block at a time."""
    return plain(hcl2.loads(block))


def texts():
    """Return the text of each file of the module by its name."""
    return {path.name: path.read_text("utf-8") for path in sorted(MODULE.glob("*.tf"))}


def blocks(files, kind):
    """Return the names and contents of the blocks of a kind, such as variables."""
    parts = [part for text in files.values() for part in re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)]
    return [item for part in parts for one in parsed(part).get(kind, []) for item in one.items()]


# The module that the template asks for


def snake(name):
    """Return the name of a variable or output for that of a parameter or output of the template."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def worded(text, template):
    """Return a sentence of the template with the names of variables instead of those of parameters."""
    return re.sub(
        r"\b[A-Z]\w+\b", lambda found: snake(found[0]) if found[0] in template["Parameters"] else found[0], text
    )


def condition(parameter, name):
    """Return the condition of a variable, or an empty text if its parameter takes any value."""
    parts = []
    if pattern := parameter.get("AllowedPattern", PATTERNS.get(parameter["Type"])):
        parts.append(f"can(regex({json.dumps(f'^(?:{pattern})$')}, var.{name}))")
    if "MinValue" in parameter:
        parts.append(f"var.{name} >= {parameter['MinValue']}")
    if "MaxValue" in parameter:
        parts.append(f"var.{name} <= {parameter['MaxValue']}")
    if "AllowedValues" in parameter:
        parts.append(f"contains({json.dumps(parameter['AllowedValues'])}, var.{name})")
    return " && ".join(parts)


def variable(name, template):
    """Return the variable for a parameter, as the parser reads it."""
    parameter = template["Parameters"][name]
    found = {"type": TYPES[parameter["Type"]], "description": worded(parameter["Description"], template)}
    if "Default" in parameter:
        found["default"] = parameter["Default"]
    found["nullable"] = False
    if text := condition(parameter, snake(name)):
        form = worded(parameter.get("ConstraintDescription") or FORMS[parameter["Type"]], template)
        found["validation"] = [{"condition": f"${{{text}}}", "error_message": f"{snake(name)} {form}"}]
    return found


def expression(test, *, holds=True):
    """Return a condition of a rule, or its opposite, as an expression of the module."""
    ((function, operands),) = test.items()
    if function == "Ref":
        return f"var.{snake(operands)}"
    if function == "Fn::Not":
        return expression(operands[0], holds=not holds)
    if function == "Fn::Equals":
        sides = [expression(one) if isinstance(one, dict) else json.dumps(one) for one in operands]
        return f" {'==' if holds else '!='} ".join(sides)
    word = "&&" if (function == "Fn::And") == holds else "||"
    return f"({f' {word} '.join(expression(one, holds=holds) for one in operands)})"


def preconditions(template):
    """Return a precondition for each assertion of the rules of the template, as the parser reads it."""
    return [
        {
            "condition": f"${{{expression(rule['RuleCondition'], holds=False)} || {expression(one['Assert'])}}}",
            "error_message": worded(one["AssertDescription"], template),
        }
        for rule in template["Rules"].values()
        for one in rule["Assertions"]
    ]


# Comparing


def differences(kind, found, wanted):
    """Return a line for each block that differs from what the template asks for."""
    names = [name for name, _ in found]
    lines = [f"{kind} {name}: it occurs twice" for name in sorted({*names}) if names.count(name) > 1]
    found = dict(found)
    lines += [f"{kind} {name}: it is missing" for name in wanted.keys() - found.keys()]
    lines += [f"{kind} {name}: the template has none" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        for key in sorted(wanted[name].keys() | found[name].keys()):
            one, other = found[name].get(key), wanted[name].get(key)
            if one != other or type(one) is not type(other):
                lines.append(f"{kind} {name}: {key} is {one!r}, not {other!r}")
    return lines


def hours(text):
    """Return the hours of a time-out."""
    return int(re.fullmatch(r"(\d+)h", text)[1])


def stack_faults(stack, template, capabilities):
    """Return what is wrong with the resource."""
    lines = [f"the resource has no {name}" for name in ARGUMENTS - stack.keys()]
    lines += [f"the resource has {name}" for name in stack.keys() - ARGUMENTS]
    for name in LITERALS.keys() & stack.keys():
        if stack[name] != LITERALS[name]:
            lines.append(f"{name} is {stack[name]}")
    if stack.get("capabilities") != capabilities:
        lines.append(f"capabilities are {stack.get('capabilities')}, not {capabilities}")
    wanted = {name: f"${{var.{snake(name)}}}" for name in template["Parameters"]}
    given = stack.get("parameters", {})
    lines += [f"parameter {name} is {given.get(name)}" for name in wanted if given.get(name) != wanted[name]]
    lines += [f"parameter {name}: the template has none" for name in given.keys() - wanted.keys()]
    (limits,), (lifecycle,) = stack.get("timeouts", [{}]), stack.get("lifecycle", [{}])
    # A rollout watches the alarms twice, and so does its rollback; the instances take an hour at most.
    longest = 4 * template["Parameters"]["SoakSeconds"]["MaxValue"] + HOUR
    if hours(limits.get("create", "0h")) < 1 or hours(limits.get("update", "0h")) * HOUR < longest:
        lines.append("the time-outs are too short")
    if lifecycle.get("prevent_destroy") is not True:
        lines.append("the stack can be destroyed")
    if lifecycle.get("ignore_changes") != ["on_failure"]:
        lines.append("an imported stack would be replaced")
    checks, asked = lifecycle.get("precondition", []), preconditions(template)
    lines += [f"precondition missing: {one['condition']}: {one['error_message']}" for one in asked if one not in checks]
    lines += [f"precondition without a rule: {one['condition']}" for one in checks if one not in asked]
    return lines


def faults(files, template, capabilities):
    """Return what is wrong with a module for a template that needs these capabilities."""
    variables = blocks(files, "variable")
    lines = [f"variable {name}: it is missing" for name in OWN - dict(variables).keys()]
    of_template = [(name, one) for name, one in variables if name not in OWN]
    lines += differences(
        "variable", of_template, {snake(name): variable(name, template) for name in template["Parameters"]}
    )
    outputs = {
        snake(name): {
            "description": worded(one["Description"], template),
            "value": f'${{aws_cloudformation_stack.chatd.outputs["{name}"]}}',
        }
        for name, one in template["Outputs"].items()
    }
    lines += differences("output", blocks(files, "output"), outputs)
    resources = blocks(files, "resource")
    if [(kind, [*one]) for kind, one in resources] != [("aws_cloudformation_stack", ["chatd"])]:
        return [*lines, "the module has other resources than the stack"]
    return lines + stack_faults(resources[0][1]["chatd"], template, capabilities)


def example_faults(page, files):
    """Return what is wrong with the example of a page: the first block of HCL."""
    (text,) = re.findall(r"^```hcl\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    example = {"example": text}
    call = dict(blocks(example, "module"))["chatd"]
    variables, outputs = dict(blocks(files, "variable")), dict(blocks(files, "output"))
    needed = {name for name, one in variables.items() if "default" not in one}
    lines = [f"there is no variable {name}" for name in sorted(call.keys() - {"source"} - variables.keys())]
    lines += [f"variable {name} is missing" for name in sorted(needed - call.keys())]
    if call["source"].partition("//")[2].partition("//")[2].partition("?")[0] != str(MODULE.relative_to(ROOT)):
        lines.append("the source is another folder")
    used = [re.fullmatch(r"\$\{module\.chatd\.(\w+)\}", one["value"])[1] for _, one in blocks(example, "output")]
    return lines + [f"there is no output {name}" for name in used if name not in outputs]


def oversized(text):
    """Return whether a template must lie in S3."""
    return len(text.encode()) > LARGEST
