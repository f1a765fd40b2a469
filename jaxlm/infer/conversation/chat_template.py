"""A program that renders chat templates within limits; `chat_ids.py` runs it.

A template comes with a model's files and may be hostile. Jinja's sandbox keeps it away
from the machine, but does not stop it from running forever or filling the memory; the
separate process and its limits do. The file is run by path in isolated mode, so it
imports neither jaxlm nor JAX.

Reads {"template": ..., "variables": [{...}, ...]} from stdin and writes {"texts":
[...]} or {"error": ...} to stdout, both JSON, a line each, for one job after the other.
What a template does leaves nothing behind: the sandbox lets it change no value of
others. The arguments are folders to import from. On macOS the memory limit is not
enforced; the other limits are.
"""

import datetime
import json
import math
import resource
import sys
from functools import lru_cache
from typing import Any, ClassVar

MAX_TEMPLATE_BYTES = 64_000
MAX_OUTPUT_BYTES = 1_000_000
MAX_CPU_SECONDS = 2
MAX_MEMORY_BYTES = 512 << 20

TOO_LONG = f"gives more than {MAX_OUTPUT_BYTES:,} bytes of text"
TOO_LARGE = f"needs more than {MAX_MEMORY_BYTES >> 20} MB of memory"


def set_limits() -> None:
    """Limits this process's memory, and turns core dumps off."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "darwin":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def limit_time() -> None:
    """Limits the CPU time that this process takes from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime) + MAX_CPU_SECONDS
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if most != resource.RLIM_INFINITY:
        seconds = min(seconds, most)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))


def new_environment() -> Any:
    """Jinja's sandbox with the extensions and globals that published templates use."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks text to train on; here its body is rendered as is."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        """A namespace that rejects names with a leading underscore."""

        def __init__(*arguments, **values):
            self, *rest = arguments
            values = dict(*rest, **values)
            for name in values:
                PlainNamespace._check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            PlainNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name):
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name!r}")

    class Dict:
        """Builds dicts without exposing the class `dict` itself."""

        def __call__(self, *arguments, **values):
            return dict(*arguments, **values)

        def fromkeys(self, keys, value=None):
            return dict.fromkeys(keys, value)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(pattern):
        return datetime.datetime.now().strftime(pattern)

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "dict": Dict(),
        "namespace": PlainNamespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    return environment


@lru_cache(maxsize=4)
def compiled(template: str) -> Any:
    """Returns a template that can be rendered."""
    return new_environment().from_string(template)


def render(template: str, variables: list[dict[str, Any]]) -> list[str]:
    """Renders a template with each of the variables.

    Raises:
      OverflowError: if a text exceeds `MAX_OUTPUT_BYTES`.
    """
    program, texts = compiled(template), []
    for values in variables:
        parts, size = [], 0
        for part in program.generate(**values):
            size += len(part.encode("utf-8", "surrogatepass"))
            if size > MAX_OUTPUT_BYTES:
                raise OverflowError(TOO_LONG)
            parts.append(part)
        texts.append("".join(parts))
    return texts


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Renders a job; any failure is part of the answer."""
    try:
        return {"texts": render(job["template"], job["variables"])}
    except MemoryError:
        return {"error": TOO_LARGE}
    except Exception as error:
        if str(error) == TOO_LONG:
            return {"error": TOO_LONG}
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        message = " ".join(str(error)[:2000].split())[:300]
        return {"error": f"fails{where}: {type(error).__name__}: {message}"}


def main() -> None:
    """Renders the jobs on stdin and writes the answers to stdout."""
    sys.path.extend(sys.argv[1:])
    set_limits()
    for line in sys.stdin.buffer:
        limit_time()
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
