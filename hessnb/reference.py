"""The API reference: signatures, docstrings and source links of the public names, read from the source, as MyST pages.

Nothing is imported: what a reader sees is what stands in the files. A name in single backticks that has an entry of its
own becomes a link to it; everything else in a docstring is shown as it is written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Page -> the modules that stand on it.
PAGES = {
    "data": ("hessnb.data",),
    "models": ("hessnb.models",),
    "training": ("hessnb.training", "hessnb.together"),
    "curvature": ("hessnb.curvature",),
    "attacks": ("hessnb.attacks",),
    "robustness": ("hessnb.robustness",),
    "landscape": ("hessnb.landscape",),
    "sharpness": ("hessnb.sharpness",),
    "statistics": ("hessnb.statistics",),
    "experiments": (
        "hessnb.experiments.run",
        "hessnb.experiments.results",
        "hessnb.experiments.spec",
        "hessnb.experiments.grid",
        "hessnb.experiments.profile",
        "hessnb.experiments.store",
        "hessnb.experiments.record",
    ),
}

# Signatures up to this many characters stay on one line.
_LINE = 80

# From the path of each documented name to its target.
Labels = dict[str, str]

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Entry:
    """A public name: where it is defined, and its node in that file."""

    module: str
    name: str
    file: Path
    node: Definition

    @property
    def path(self) -> str:
        """The name with its module, as one imports it."""
        return f"{self.module}.{self.name}"

    @property
    def label(self) -> str:
        """The target of cross-references to this entry; Sphinx takes ``Artefact`` and ``artefact`` for the same."""
        return f"class-{self.path}" if isinstance(self.node, ast.ClassDef) else self.path


def pages(package: Path, source: str) -> dict[str, str]:
    """Return the text of each page by name; ``package`` is the folder of hessnb, ``source`` the address of its files.

    A file ``hessnb/data.py`` is linked as ``<source>/hessnb/data.py#L12``.
    """
    found = {module: list(entries(package, module)) for modules in PAGES.values() for module in modules}
    known = {entry.path: entry.label for module in found.values() for entry in module}
    texts = {}
    for page, modules in PAGES.items():
        parts = [f"# `{modules[0]}`" if len(modules) == 1 else f"# `hessnb.{page}`"]
        for module in modules:
            if len(modules) > 1:
                parts.append(f"## `{module}`")
            docstring = ast.get_docstring(_parse(_file(package, module))) or ""
            parts.append(_prose(docstring, module, known))
            level = "##" if len(modules) == 1 else "###"
            parts += [_section(entry, level, package, source, known) for entry in found[module]]
        texts[page] = "\n\n".join(parts) + "\n"
    return texts


def entries(package: Path, module: str) -> Iterator[Entry]:
    """Return the public names of a module: those of its ``__all__``, else the functions and classes it defines."""
    file = _file(package, module)
    tree = _parse(file)
    names = _exported(tree)
    if names is None:
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
    for name in names:
        yield Entry(module, name, *_definition(package, file, name))


def _definition(package: Path, file: Path, name: str) -> tuple[Path, Definition]:
    """Return the file and the node that define a name, following imports inside the package."""
    for node in _parse(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return file, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and _target(node) == name:
            return file, node
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return _definition(package, _file(package, node.module), name)
    raise LookupError(f"{file} neither defines nor imports {name}")


def _exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and _target(node) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


def _file(package: Path, module: str) -> Path:
    path = package.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


# -- rendering -----------------------------------------------------------------------------------------------------


def _section(entry: Entry, level: str, package: Path, source: str, known: Labels) -> str:
    node = entry.node
    link = f"{source}/{entry.file.relative_to(package.parent).as_posix()}#L{node.lineno}"
    heading = [f"({entry.label})=", f"{level} `{entry.name}`"]
    if not isinstance(node, ast.ClassDef):
        return "\n\n".join([*heading, _code(_head(node)), _text(entry, known), f"[Source]({link})"])
    bases = list(_bases(package, entry.file, node))
    documented = [base for base in bases if f"{entry.module}.{base.name}" in known]
    members = [n for base in bases if base not in documented for n in base.body] + node.body
    inherited = [n for base in documented for n in base.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    parts = [*heading, _code(_class_head(node, members, inherited)), _text(entry, known)]
    for method in _methods(node):
        told = _prose(ast.get_docstring(method) or "", entry.module, known)
        parts.append(f"{_code(_head(method))}\n\n{told}")
    parts += [_prose(f"With the members of `{base.name}`.", entry.module, known) for base in documented]
    return "\n\n".join([*parts, f"[Source]({link})"])


def _bases(package: Path, file: Path, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """Return the classes of the package that a class inherits from, the remotest first."""
    for base in node.bases:
        try:
            found, definition = _definition(package, file, ast.unparse(base))
        except LookupError:  # from elsewhere
            continue
        if isinstance(definition, ast.ClassDef):
            yield from _bases(package, found, definition)
            yield definition


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _class_head(node: ast.ClassDef, members: Sequence[ast.stmt], inherited: Sequence[ast.FunctionDef]) -> str:
    """Return the lines that declare a class: its bases, its fields, and how it is made, if by an inherited function."""
    bases = ", ".join(map(ast.unparse, node.bases))
    fields = [ast.unparse(n) for n in members if isinstance(n, ast.AnnAssign) and _target(n)[:1] != "_"]
    init = [n for n in members if isinstance(n, ast.FunctionDef) and n.name == "__init__"] or inherited
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    body = "\n".join([*fields, *map(_head, init)]).replace("\n", "\n    ")
    return f"{head}:\n    {body}" if body else head


def _head(node: ast.FunctionDef | ast.Assign | ast.AnnAssign) -> str:
    """Return the line or lines that declare a function, by its signature, or a constant."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return ast.unparse(node)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    start = "@property\n" if _is_property(node) else ""
    line = f"{start}def {node.name}({ast.unparse(node.args)}){returns}"
    if len(line) <= _LINE:
        return line
    return f"{start}def {node.name}(\n" + "".join(f"    {a},\n" for a in _arguments(node.args)) + f"){returns}"


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    """Return the arguments one by one, each with annotation and default, as in the source."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(positional, defaults, strict=True):
        yield _argument(argument, default)
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Return the public methods, and what an operator or a call stands for."""
    functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    public = [f for f in functions if f.name[0] != "_" or f.name in ("__call__", "__matmul__")]
    return [f for f in public if not any("overload" in ast.dump(d) for d in f.decorator_list)]


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id in ("property", "cached_property") for d in node.decorator_list)


def _text(entry: Entry, known: Labels) -> str:
    """Return the docstring as MyST; for a constant, the comment above it."""
    if not isinstance(entry.node, ast.Assign | ast.AnnAssign):
        return _prose(ast.get_docstring(entry.node) or "", entry.module, known)
    comment: list[str] = []
    for line in reversed(entry.file.read_text().splitlines()[: entry.node.lineno - 1]):
        if not line.startswith("#"):
            break
        comment.insert(0, line.removeprefix("#").strip())
    return _prose("\n".join(comment), entry.module, known)


def _prose(docstring: str, module: str, known: Labels) -> str:
    """Return a docstring as MyST: indented blocks as they stand, code in backticks, links where there is an entry."""
    blocks = re.split(r"\n\s*\n", docstring)
    return "\n\n".join(
        f"```text\n{block}\n```" if block.startswith("    ") else _inline(block, module, known) for block in blocks
    )


def _inline(text: str, module: str, known: Labels) -> str:
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    return "".join(_span(part, module, known) if part.startswith("`") else _escaped(part) for part in parts)


def _span(code: str, module: str, known: Labels) -> str:
    name = code.strip("`")
    for path in (name, f"{module}.{name}"):
        if not code.startswith("``") and path in known:
            return f"[`{name}`](#{known[path]})"
    return code


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_$<>\[\]{}#|~^])", r"\\\1", text)
