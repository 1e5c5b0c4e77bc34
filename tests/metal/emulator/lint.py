"""What clang accepts in C++ and Metal does not, as far as the text shows it."""

import re

from .rewrite import strip_comments

_FORBIDDEN = {
    r"\bdouble\b": "Metal has no double",
    r"\blong\s+(long|double)\b": "Metal has no long long and no long double",
    r"\bstd::": "Metal has no std::",
    r"#\s*include\s*<(?!metal)": "only Metal's own headers can be included",
    r"\b(try|catch|throw)\b": "Metal has no exceptions",
    r"\b(virtual|dynamic_cast|typeid)\b": "Metal has no virtual functions and no run-time types",
    r"\b(new|delete)\b(?!\s*;)": "Metal has no new and delete",
    r"\bgoto\b": "Metal has no goto",
    r"\bthread_local\b": "Metal has no thread_local",
    r"\bprintf\s*\(": "Metal has no printf",
    r"\b(asm|__asm__)\b": "Metal has no inline assembly",
    r"__(global|local|private|shared|device)(__)?\b": "not a Metal qualifier; expected device, threadgroup, thread "
    "or constant",
    r"__syncthreads|__shfl\w*|\b(threadIdx|blockIdx|blockDim)\b": "CUDA, not Metal",
    r"\b__builtin_\w+": "a clang builtin, which Metal does not promise",
    r"\bthreadgroup\s+[^;*&(){}\[=]*(?:\[[^\];]*\]\s*)*=[^=]": "a threadgroup variable cannot have an initialiser",
}


def lint_text(name: str, text: str) -> list[str]:
    """Problems in `text`, as `name:line: message` lines."""
    text = strip_comments(text)
    found = []
    for pattern, message in _FORBIDDEN.items():
        for match in re.finditer(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            found.append((line, f"{name}:{line}: {message}; found `{match[0].strip()}`"))
    return [problem for _, problem in sorted(found)]
