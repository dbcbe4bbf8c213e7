"""Our docstrings, which are plain text, as reStructuredText.

A paragraph may be a list of arguments: a name, two spaces or more, and what it is; lines that go on are
indented. Indented paragraphs are formulas, tables or code, and stay as they are. `Names` are code.
"""

import inspect
import re

ITEM = re.compile(r"(?P<name>\S+(?:, \S+)*) {2,}(?P<text>\S.*)")
ALONE = re.compile(r"\w+(?:, \w+)*")
CODE = re.compile(r"`([^`]+)`")
LINKED = re.compile(r"magic(\.\w+)+")


def process(app, what, name, obj, options, lines):
    """Sphinx's event autodoc-process-docstring: change the lines in place."""
    lines[:] = converted(lines)


def skip(app, what, name, obj, skip, options):
    """Sphinx's event autodoc-skip-member: old names, which only warn, are not shown."""
    return True if (inspect.getdoc(obj) or "").startswith("The old name of") else None


def converted(lines):
    out = []
    for block in blocks(lines):
        if all(line.startswith("    ") for line in block):
            out += ["::", "", *block]
        elif items := arguments(block):
            out += [".. container:: arguments", ""]
            for name, text in items:
                out += [f"    {code(name)}", f"        {inline(text)}"]
        else:
            out += [inline(line.strip()) for line in block]
        out.append("")
    return out


def blocks(lines):
    """The paragraphs; a list of arguments ends one, and so do indented lines beside others."""
    block = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield from parts(block)
            block = []


def parts(block):
    """Prose that leads into a list of arguments, without a blank line between, is a paragraph of its own."""
    first = next((i for i, line in enumerate(block) if starts(line, block[i + 1 :])), len(block))
    if 0 < first < len(block) and not block[0].startswith(" "):
        yield block[:first]
        block = block[first:]
    yield block


def starts(line, following):
    alone = ALONE.fullmatch(line) and following and following[0].startswith("   ")
    return bool(ITEM.fullmatch(line) or alone)


def arguments(block):
    """(name, text) of each line of a list of arguments; nothing for a paragraph that is none."""
    items, column = [], None
    for i, line in enumerate(block):
        if match := ITEM.fullmatch(line):
            items.append([match["name"], match["text"]])
            column = match.start("text")
        elif line.startswith("  ") and items:
            items[-1][1] = f"{items[-1][1]} {line.strip()}".strip()
        elif column and ALONE.fullmatch(line[: column - 1]) and line[column - 1 : column] == " ":
            items.append([line[: column - 1], line[column:]])
        elif starts(line, block[i + 1 :]):
            items.append([line, ""])
        else:
            return []
    return items


def code(names):
    return ", ".join(f"``{name}``" for name in names.split(", "))


def inline(text):
    """One line of prose: code in backquotes, and nothing else that means something to reStructuredText."""
    pieces = CODE.split(text)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            pieces[i] = re.sub(r"([\\*|]|_(?!\w))", r"\\\1", piece)
        else:
            pieces[i] = f":py:obj:`{piece}`" if LINKED.fullmatch(piece) else f"``{piece}``"
        # markup ends where a letter follows
        if i % 2 == 0 and i and piece[:1].isalnum():
            pieces[i] = "\\ " + pieces[i]
    return "".join(pieces)
