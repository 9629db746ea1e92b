"""The names that a class declares, overrides and uses, for tests of the classes that derive from a library's."""

import ast
import inspect

PYTHON = {
    *("__module__", "__doc__", "__annotations__", "__dict__", "__weakref__", "__parameters__", "__orig_bases__"),
    *("__implemented__", "__provides__", "__providedBy__", "__firstlineno__", "__static_attributes__"),
    *("__annotate__", "__annotate_func__", "__annotations_cache__"),
}


def names_of(one):
    """Return the names that a class declares itself."""
    return {*vars(one), *inspect.get_annotations(one)} - PYTHON


def used_in(one):
    """Return the attributes of `self`, `super()` and `blank` that the source of a class uses."""
    tree = ast.parse(inspect.getsource(one))
    owners = ("self", "super()", "blank")
    return {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners
    }


def overrides(one):
    """Return the names that a class marks with `override`."""
    return {name for name, value in vars(one).items() if getattr(value, "__override__", False)}


def source_of(one):
    """Return the source of a class and of its bases."""
    return "".join(inspect.getsource(base) for base in one.__mro__ if base is not object)
