"""Write the functions of Python's standard library as rows: signature and docstring, then body.

    python examples/stdlib.py data/stdlib
    lorasweep lr_ratio scale=small dataset=stdlib

The code is under the PSF licence and comes with every Python; other versions give other rows.
"""

import ast
import json
import sys
import sysconfig
from pathlib import Path

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def functions(path):
    """Yield prompt and completion of each function of a file that has a docstring and a body."""
    code = path.read_text(encoding="utf-8")
    lines = [line + "\n" for line in code.split("\n")]  # as ast counts them
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            doc, first = node.body[0], node.body[1]
            if node.lineno <= doc.lineno < doc.end_lineno + 1 <= first.lineno:
                own = lines[node.lineno - 1 : node.end_lineno]
                own = [line.removeprefix(" " * node.col_offset) for line in own]
                n_prompt = doc.end_lineno - node.lineno + 1
                prompt, body = "".join(own[:n_prompt]), "".join(own[n_prompt:]).rstrip() + "\n"
                if same(ast.parse(prompt + body).body[0], node):  # else a string has other spaces
                    yield prompt, body


def same(one, other):
    """Return whether two functions have the same body after the docstring."""
    a, b = (ast.dump(ast.Module(node.body[1:], [])) for node in (one, other))
    return a == b


if len(sys.argv) != 2:
    sys.exit("usage: python examples/stdlib.py FOLDER")
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
library = Path(sysconfig.get_paths()["stdlib"])
paths = [p for p in library.rglob("*.py") if not NOT_THE_LIBRARY & {*p.relative_to(library).parts}]
rows = dict.fromkeys(row for path in sorted(paths) for row in functions(path))
lines = (json.dumps({"prompt": prompt, "completion": body}) for prompt, body in rows)
text, path = "".join(f"{line}\n" for line in lines), folder / "train.jsonl"
if path.exists() and path.read_bytes() != text.encode():
    sys.exit(f"{path} has other rows and was not changed. Give another folder.")
path.write_text(text, encoding="utf-8")
print(f"{len(rows):,} functions of Python {sys.version.split()[0]} in {path}")
