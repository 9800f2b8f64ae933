"""Try a pickle in a child process first, to bound the cost of loading it.

A few bytes can ask for gigabytes, for a hash that takes years, or for more stack than there is, and
the process that loads them cannot stop that. The child knows no classes but stand-ins. Its time and
memory are limited by the pickle's size.
"""

import subprocess
import sys

_CPU = (10, 0.3e-6)  # seconds, and seconds more for each byte of the pickle
_MEMORY = (600_000_000, 40)  # bytes of address space, and bytes more for each byte of it
_CHILD = """
import collections, io, pickle, resource, sys
memory, cpu = int(sys.argv[1]), int(sys.argv[2])
content = sys.stdin.buffer.read()
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
class Any(tuple):
    def __new__(cls, *args):
        return tuple.__new__(cls, args)
    def __setstate__(self, state):
        self.state = state
    def __hash__(self):
        state = getattr(self, "state", None)
        return hash((tuple(self), tuple(state.values()) if isinstance(state, dict) else state))
    def append(self, item):
        pass
    def __setitem__(self, key, value):
        hash(key)
class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return {"set": set, "frozenset": frozenset}.get(name, Any)
Reader(io.BytesIO(content)).load()
"""


def check_pickle(content: bytes) -> None:
    """Raise ValueError if ``content`` is no pickle, or costs far more than its size explains."""
    cpu = int(_CPU[0] + _CPU[1] * len(content))
    memory = _MEMORY[0] + _MEMORY[1] * len(content)
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(memory), str(cpu)]
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    if done.returncode < 0:
        raise ValueError(f"it takes more than {cpu} s, or more stack than there is")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        raise ValueError(lines[-1] if lines else "it is no pickle")
