"""Read the prose that every CPython carries: help topics, docstrings, sources.

Python sources are parsed, never imported. Extension modules have no source, so a fixed list of
harmless ones is imported and their ``__doc__`` read.
"""

import ast
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

Wanted = Callable[[str], bool]
"""Answers for a unit's name whether it shall be read."""

SKIPPED_PARTS = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "turtledemo",
     "pydoc_data", "__pycache__", "_vendor", "encodings", "antigravity", "this"]
)  # fmt: skip
"""Path parts that are not prose, not in every distribution, or not part of CPython."""

EXTENSION_MODULES = (
    "builtins", "sys", "math", "cmath", "itertools", "time", "gc", "zlib", "array", "binascii",
    "errno", "faulthandler", "marshal", "mmap", "select", "unicodedata", "pyexpat", "atexit",
    "_abc", "_asyncio", "_bisect", "_blake2", "_bz2", "_codecs", "_collections", "_contextvars",
    "_csv", "_datetime", "_decimal", "_elementtree", "_functools", "_hashlib", "_heapq", "_imp",
    "_io", "_json", "_locale", "_lsprof", "_lzma", "_md5", "_multiprocessing", "_operator",
    "_pickle", "_queue", "_random", "_sha3", "_signal", "_socket", "_sqlite3", "_sre", "_ssl",
    "_stat", "_statistics", "_string", "_struct", "_symtable", "_thread", "_tracemalloc",
    "_typing", "_uuid", "_warnings", "_weakref", "_zoneinfo", "posix", "fcntl", "grp", "pwd",
    "resource", "syslog", "termios", "_curses",
)  # fmt: skip
"""Modules without Python source whose import has no side effect beyond loading them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One docstring or topic: where it stands and what it says.

    Attributes:
        unit: what is split as a whole: ``topic:<name>`` or ``module:<dotted name>``.
        heading: the object and its signature, one line; empty for a topic.
        text: the text under the heading, whitespace normalised.
    """

    unit: str
    heading: str
    text: str


def normalise_whitespace(text: str) -> str:
    """Dedent, expand tabs, strip line ends and control characters, allow one blank line."""
    text = inspect.cleandoc(text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE)
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def stdlib_folder() -> Path:
    """Return the folder of the standard library's Python sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def topic_pieces(wanted: Wanted) -> Iterator[Piece]:
    """Yield the wanted help topics in order of name; none where a distribution strips them."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in filter(lambda name: wanted(f"topic:{name}"), sorted(topics)):
        yield Piece(f"topic:{name}", "", normalise_whitespace(topics[name]))


def source_files(folder: Path) -> list[tuple[str, Path]]:
    """Return (dotted module name, path) of the library's own Python sources, sorted by name."""
    found = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        is_module = all(part.isidentifier() for part in parts)
        if is_module and not SKIPPED_PARTS.intersection(parts):
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(found)


def read_source(path: Path) -> str:
    """Return the text of a library source, which PEP 263 lets be other than UTF-8."""
    return path.read_text(encoding="utf-8", errors="replace")


def source_pieces(folder: Path, wanted: Wanted) -> Iterator[Piece]:
    """Yield every docstring of the wanted library sources, in order of module and line."""
    for module, path in source_files(folder):
        if not wanted(f"module:{module}"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(read_source(path))
        except (SyntaxError, ValueError):
            continue  # files kept broken on purpose (test data, templates)
        yield from _pieces_of_node(f"module:{module}", module, tree)


def _pieces_of_node(unit: str, qualname: str, node: ast.AST) -> Iterator[Piece]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield Piece(unit, _heading(qualname, node), normalise_whitespace(docstring))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _pieces_of_node(unit, f"{qualname}.{child.name}", child)
        elif isinstance(child, ast.stmt | ast.ExceptHandler) and not isinstance(child, SIMPLE):
            yield from _pieces_of_node(unit, qualname, child)


SIMPLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Import, ast.ImportFrom)


def _heading(
    qualname: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> str:
    if isinstance(node, ast.Module):
        return f"module {qualname}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {qualname}({bases})" if bases else f"class {qualname}"
    return f"{qualname}({ast.unparse(node.args)})"


def extension_pieces(wanted: Wanted) -> Iterator[Piece]:
    """Yield the docstrings of the wanted extension modules that are here, members sorted."""
    for name in EXTENSION_MODULES:
        if not wanted(f"module:{name}"):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield from _pieces_of_module(module, name)


def _pieces_of_module(module: ModuleType, name: str) -> Iterator[Piece]:
    unit = f"module:{name}"
    if module.__doc__:
        yield Piece(unit, f"module {name}", normalise_whitespace(module.__doc__))
    for member_name, member in _public_members(module):
        yield from _piece_of_member(unit, f"{name}.{member_name}", member)
        if isinstance(member, type):
            for attribute_name, attribute in _public_members(member):
                qualname = f"{name}.{member_name}.{attribute_name}"
                yield from _piece_of_member(unit, qualname, attribute)


def _public_members(owner: object) -> list[tuple[str, object]]:
    members = vars(owner)
    return [(name, members[name]) for name in sorted(members) if not name.startswith("_")]


def _piece_of_member(unit: str, qualname: str, member: object) -> Iterator[Piece]:
    # Constants answer with their type's docstring, which says nothing about them.
    if not (callable(member) or inspect.isdatadescriptor(member)):
        return
    docstring = getattr(member, "__doc__", None)
    if not isinstance(docstring, str) or not docstring.strip():
        return
    signature = getattr(member, "__text_signature__", None) or ""
    signature = re.sub(r"\$\w+,? ?|, /|/, ", "", signature)
    kind = "class " if isinstance(member, type) else ""
    yield Piece(unit, f"{kind}{qualname}{signature}", normalise_whitespace(docstring))
