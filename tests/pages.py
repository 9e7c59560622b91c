"""Follow a page of the documentation as a reader would, from an empty folder.

In order: a block whose first line is a comment with a file name is written to that file; other Python runs; lines of
``bash`` that call ``vdiff`` run as commands, in this process.
"""

import re
import shlex
import sys
from pathlib import Path

from vdiff.cli import main

BLOCK = re.compile(r"^```(python|yaml|bash)\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"# ([\w.-]+\.(?:py|yaml))\n")
NOT_HERE = ("pip ", "make ", "git ", "python")  # what sets a machine up is tried on a machine


def blocks(page):
    """``(language, file name or None, text)`` of every block."""
    for language, text in BLOCK.findall(Path(page).read_text()):
        named = FILE.match(text)
        yield language, named and named[1], text


def follow(page):
    """Do what the page says in the current folder; the names that its Python leaves behind."""
    names = {"__name__": Path(page).stem}
    for number, (language, file, text) in enumerate(blocks(page)):
        where = f"{Path(page).name}, block {number}"
        if file:
            Path(file).write_text(text)
        elif language == "python":
            sys.path.insert(0, str(Path.cwd()))  # as for `python page.py`; the vdiff command has no such place
            try:
                exec(compile(text, where, "exec"), names)
            finally:
                sys.path.pop(0)
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                command(line, where)
    return names


def command(line, where):
    words = shlex.split(line, comments=True)
    if not words or line.startswith(NOT_HERE):
        return
    assert words[0] == "vdiff", f"{where}: {line}"
    assert main(words[1:]) == 0, f"{where}: {line}"


def forget(folder):
    """Modules that a page wrote are not found by the next one."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
