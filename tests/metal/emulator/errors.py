"""The one error of the emulator."""


class MetalError(Exception):
    """A kernel does not compile, breaks a rule of Metal, or misbehaves when it runs.

    The message has one line per problem, each with the kernel's file and line: `name.metal` is the `source` given
    to `metal_kernel`, `name.header` its `header`.
    """
