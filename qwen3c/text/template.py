"""Chat templates: Jinja from a model file, rendered where it can do no harm.

A template is a program by whoever made the file. Jinja's sandbox keeps it away from Python's objects,
but not from a thousand nested loops, `'x' * 10**10` or `10**(10**10)`, and no list of such cases is ever
complete. So every template is rendered in a child process whose memory and processor time the system
bounds: a template that passes the bounds kills the child, and the next rendering starts another. The child
starts in 0.1 s, takes 20 MB, and then renders a conversation in about a millisecond.

This file is both sides: imported it is `Renderer`, run as a script it is the child. It imports nothing
of the package, so that the child needs Jinja alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from typing import IO, Any

CPU_SECONDS = 1.0  # processor time of one rendering; a second more for every 4 MB of conversation
WALL_SECONDS = 10.0  # bound where processor time has none; a second more for every MB
MEMORY = 192 << 20  # bytes of address space the child may have; 64 more for every byte of conversation
OUTPUT = 1 << 20  # characters of rendered text; two more for every byte of conversation


class ChatTemplateError(ValueError):
    """The template is broken, passes a bound, or refuses the conversation; the message is one line."""


# ----------------------------------------------------------------------------
# The parent process


class Renderer:
    """Renders templates in one child process, started when first needed. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def start(self) -> None:
        """Start the child now, so that the first rendering need not wait for it."""
        with self._lock:
            self._running_child()

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text of `template` with `variables`, which are plain JSON data. Raises ChatTemplateError."""
        try:
            request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        except (RecursionError, TypeError, ValueError) as error:
            raise ChatTemplateError(f"the conversation is not plain JSON data: {_one_line(error)}") from None
        with self._lock:
            reply = self._reply(request)
        if "error" in reply:
            raise ChatTemplateError(f"chat template: {reply['error']}")
        return str(reply["text"])

    def _reply(self, request: bytes) -> dict[str, Any]:
        """What the child says to a request.

        Until its answer is complete the child is not self._child. An exception at any line, such as Ctrl-C,
        would otherwise leave an unread answer in the pipe, and the next request would take it for its own.
        """
        child = self._running_child()
        self._child = None
        try:
            answer = _ask(child, request)
            if not answer.endswith(b"\n"):
                raise ChatTemplateError(f"chat template: stopped: {_cause_of_death(child)}")
            reply: dict[str, Any] = json.loads(answer)
            if not reply["last"]:
                self._child = child
            return reply
        finally:
            if self._child is not child:
                _stop(child, os.getpid())

    def _running_child(self) -> subprocess.Popen[bytes]:
        # after os.fork() the child belongs to the parent: two processes must not share its pipes
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            child = _start()
            weakref.finalize(self, _stop, child, os.getpid())
            self._child = child
            self._owner = os.getpid()
        return self._child


def _start() -> subprocess.Popen[bytes]:
    path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C at the terminal does not reach it
        )
    except OSError as error:
        from ..system.files import reason  # not at the top of the file: the child runs without the package

        raise ChatTemplateError(f"chat template: no process to render it in: {reason(error)}") from None


def _ask(child: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The answer line, or what there is of it if the child died."""
    assert child.stdin is not None and child.stdout is not None
    alarm = threading.Timer(WALL_SECONDS + len(request) / (1 << 20), child.kill)
    alarm.daemon = True
    try:
        # no thread can be started: then only processor time is bounded
        with contextlib.suppress(RuntimeError):
            alarm.start()
        child.stdin.write(request)
        child.stdin.flush()
        return child.stdout.readline()
    except OSError:
        return b""
    finally:
        alarm.cancel()


def _cause_of_death(child: subprocess.Popen[bytes]) -> str:
    status = child.wait()
    if os.name == "posix" and status == -signal.SIGPROF:
        return f"it takes more than {CPU_SECONDS:g} s of processor time"
    if os.name == "posix" and status == -signal.SIGKILL:
        return f"it takes more than {WALL_SECONDS:g} s"
    return f"its process ended with status {status}"


def _stop(child: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        try:
            pipe.close()  # type: ignore[union-attr]
        except OSError:
            pass  # a request that could not be sent has no answer to wait for


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ----------------------------------------------------------------------------
# The child


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests, one JSON object a line each way, until the parent closes the pipe."""
    for request in requests:
        # leftovers of a large request would count against the next one's memory limit: end, another child
        # starts
        answer = {"last": len(request) > 1 << 20} | _answer(request)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        if answer["last"]:
            return


def _answer(request: bytes) -> dict[str, Any]:
    _set_limits(len(request))
    try:
        text = render(**json.loads(request))
        limit = OUTPUT + 2 * len(request)
        if len(text) > limit:
            return {"error": f"it makes {len(text)} characters, more than the {limit} allowed"}
        return {"text": text}
    except MemoryError:
        return {"error": f"stopped: it takes more than {MEMORY >> 20} MB of memory", "last": True}
    except RecursionError:
        return {"error": "stopped: it recurses too deeply"}
    except Exception as error:
        return {"error": _one_line(error)}
    finally:
        _set_limits(None)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of `template`, with Jinja set up as `transformers` does: extensions, filters and functions."""
    return str(_compiled(template).render(variables))


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %}: marks the assistant's text for training; here it has no
        effect.
        """

        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """namespace() without underscore names, which lead to Python's internals."""

        def __init__(*args: Any, **values: Any) -> None:
            jinja2.utils.Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **values).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"namespace attribute {name!r} starts with an underscore"
                )
            super().__setitem__(name, value)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            """Refuse an unsafe attribute at once; Jinja itself objects only when its value is used."""
            raise jinja2.exceptions.SecurityError(
                f"access to {attribute!r} of {type(obj).__name__!r} is unsafe"
            )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=Namespace
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson without HTML escapes (Jinja's own has them), which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(format)


def _set_limits(size: int | None) -> None:
    """Bound memory and processor time for a request of `size` bytes; None lifts the bounds."""
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = hard if size is None else MEMORY + 64 * size
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ImportError, OSError, ValueError):
        pass  # Windows has no such module, macOS no such limit
    if hasattr(signal, "setitimer"):
        # when it runs out, SIGPROF ends the process, even inside one long C call
        signal.setitimer(signal.ITIMER_PROF, 0 if size is None else CPU_SECONDS + size / (4 << 20))


def _give_up_rights() -> None:
    """Set limits by which even a template that escapes the sandbox can write no file and start no process."""
    try:
        import resource

        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
            resource.setrlimit(limit, (0, 0))
    except (ImportError, OSError, ValueError):
        pass


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        _environment()
    except ImportError:
        pass  # jinja2 is missing: the first request reports that
    _give_up_rights()
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
