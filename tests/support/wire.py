"""Encode and decode AWS's wire formats by botocore's models, so that a double answers as the real service does.

A result must be as the model has it, is written by moto's serializers, and must be the same when botocore has read it.
"""

import datetime as dt
import json
from xml.sax.saxutils import escape

COMMON = frozenset(
    {"AccessDenied", "AccessDeniedException", "AuthFailure", "ExpiredToken", "InvalidClientTokenId"}
    | {"OperationNotPermitted", "OptInRequired", "ServiceUnavailable"}
    | {"Throttling", "UnauthorizedOperation", "ValidationError"}
)
"""Errors that any operation may answer, and so no model names."""


class Fault(Exception):
    """An error that a service answers."""

    def __init__(self, code, text, status=400):
        super().__init__(text)
        self.code = code
        self.status = status


class WireFormat:
    """The wire format of one service, by botocore's model."""

    def __init__(self, service):
        from moto.core.utils import get_service_model

        self.service = service
        self.model = get_service_model(service)
        self.protocol = self.model.metadata["protocol"]

    def read(self, operation, form):
        from moto.core.parse import EC2QueryParser, QueryParser
        from werkzeug.datastructures import MultiDict

        parser = (EC2QueryParser if self.protocol == "ec2" else QueryParser)(self.model.operation_model(operation))
        return parser.parse({"values": MultiDict(form)})

    def write(self, operation, result):
        """Return the body that answers a result, which must fit the model."""
        from botocore.parsers import create_parser
        from moto.core.serialize import get_serializer_class

        model = self.model.operation_model(operation)
        if model.output_shape is not None:
            fits(model.output_shape, result, operation)
        body = get_serializer_class(self.service, self.protocol)(model).serialize(result)["body"].encode()
        read = create_parser(self.protocol).parse({"body": body, "headers": {}, "status_code": 200}, model.output_shape)
        read.pop("ResponseMetadata")
        assert read == (result or {}), (operation, read, result)
        return body

    def fault(self, fault):
        """Return the body that answers an error."""
        known = {shape.error_code for shape in self.model.error_shapes} | {
            shape.name for shape in self.model.error_shapes
        }
        assert fault.code in known | COMMON, fault.code
        error = f"<Error><Type>Sender</Type><Code>{fault.code}</Code><Message>{escape(str(fault))}</Message></Error>"
        if self.protocol == "ec2":
            text = f"<Response><Errors>{error}</Errors><RequestID>r</RequestID></Response>"
        elif self.protocol in ("query", "rest-xml"):
            text = f"<ErrorResponse>{error}<RequestId>r</RequestId></ErrorResponse>"
        else:
            text = json.dumps({"__type": fault.code, "message": str(fault)})
        return text.encode()


def fits(shape, value, path):
    """Assert that a value is as a shape of botocore's model has it."""
    kind = shape.type_name
    if kind == "structure":
        assert isinstance(value, dict), path
        assert value.keys() <= shape.members.keys(), (path, value.keys() - shape.members.keys())
        assert value.keys() >= set(shape.required_members), (path, set(shape.required_members) - value.keys())
        for name, one in value.items():
            fits(shape.members[name], one, f"{path}.{name}")
    elif kind == "list":
        assert isinstance(value, list), path
        for one in value:
            fits(shape.member, one, f"{path}[]")
    elif kind == "string":
        assert isinstance(value, str), (path, value)
        # CloudFormation's events of the stack itself have its statuses, of which the model names a part.
        assert not shape.enum or value in shape.enum or path.endswith("StackEvents[].ResourceStatus"), (path, value)
        assert len(value) >= shape.metadata.get("min", 0), (path, value)
        assert len(value) <= shape.metadata.get("max", len(value)), (path, value)
    else:
        wanted = {
            "timestamp": dt.datetime,
            "boolean": bool,
            "integer": int,
            "float": float,
            "double": float,
            "long": int,
        }
        assert isinstance(value, wanted[kind]), (path, value)
