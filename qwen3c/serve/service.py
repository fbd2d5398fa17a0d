"""A server from its sockets to its end: uvicorn run from here, signals, systemd, and a stop that lets
requests finish.

SIGTERM and Ctrl-C: no new connections, what is under way has `drain` seconds, then it is cancelled; a second
signal cancels at once. Either way the exit status is 0: the server did as it was told. SIGHUP reads the API
keys again; where a terminal is attached it means that the terminal was closed, and ends the server as SIGTERM
does, with status 129.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import uvicorn

from ..system.files import reason
from ..system.terminal import CLEAR_LINE, can_redraw, note, unheard
from .config import Settings, is_loopback
from .errors import ApiError
from .guard import OPEN, App, Guard, Rules
from .http import Limits, protocol
from .keys import Keys
from .logs import Log, Record

FIRST_FD = 3  # of the sockets that systemd hands over
SPARE_FILES = 128  # descriptors that are not connections
CANCELLING = 1.0  # seconds that cancelled requests have to say so to their readers
HUNG_UP = 128 + 1


class Service:
    """One server. `ready` is set once it answers; stop() ends it, from any thread."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        sockets: Sequence[socket.socket],
        keys: Keys,
        *,
        says: Callable[[], Sequence[str]] = tuple,
        is_healthy: Callable[[], bool] = lambda: True,
        stopping: Callable[[], None] = lambda: None,
        open_paths: frozenset[bytes] = OPEN,
    ) -> None:
        """says: further parts of the line that says that the server is ready. is_healthy: whether systemd's
        watchdog is told that all is well. stopping: called when the server is told to stop. open_paths: GET
        and HEAD of these need no key. ValueError if a socket is open to other computers and there are no
        keys.
        """
        public = settings.public or any(_is_public(listener) for listener in sockets)
        if public and keys.path is None:
            raise ValueError(
                "a socket that other computers reach takes keys: --api-keys FILE (a line: NAME KEY)"
            )
        self.settings, self.keys = settings, keys
        self.log = Log(settings.log_level, settings.log_json)
        self.ready = threading.Event()
        self._sockets = list(sockets)
        self._says, self._is_healthy, self._stopping = says, is_healthy, stopping
        hosts = {
            *settings.allowed_hosts,
            *([] if public and _is_wildcard(settings.host) else [settings.host]),
        }
        rules = Rules(hosts, settings.cors_origins, public, open_paths, settings.max_body)
        self._guard = Guard(app, rules, keys, self.log)
        self._server = _Server(self._config(self._guard), settings.drain, self._is_up, self._beat)
        self._hung_up = False

    def run(self) -> int:
        """Serve until told to stop; the exit status. Whatever the application raises at its start is raised
        here.
        """
        with _signals(self._handlers()), _uvicorn_says(self._hear):
            try:
                self._server.run(self._sockets)
            except SystemExit:  # uvicorn's word for an application that did not start
                raise _cause(self._guard.failure) from None
            finally:
                notify("STOPPING=1")
                for listener in self._sockets:
                    listener.close()
        return HUNG_UP if self._hung_up else 0

    def stop(self) -> None:
        """Ask the server to stop; the second time, to stop without waiting for anybody."""
        self._stopping()
        self._server.ask_to_stop()

    def _config(self, guard: Guard) -> uvicorn.Config:
        settings = self.settings
        limits = Limits(
            settings.header_timeout,
            settings.body_timeout,
            settings.write_timeout,
            min(settings.connections, max(_allow_files(settings.connections) - SPARE_FILES, 1)),
        )
        return uvicorn.Config(
            guard,
            http=protocol(limits, self._log_refusal),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # call_later() takes fractions
        )

    def _log_refusal(self, error: ApiError) -> None:
        record = Record("-", "(no HTTP)", status=error.status)
        record.finish()
        self.log.request(record)

    def _hear(self, record: logging.LogRecord) -> None:
        """A warning of uvicorn or asyncio becomes one line. What the guard has told already, or run() raises,
        is dropped.
        """
        message = record.getMessage().split("\n")[0]
        if not self._server.started or message.startswith(("ASGI callable returned", "Invalid HTTP request")):
            return
        error = record.exc_info[1] if record.exc_info else None
        cause = f" ({type(error).__name__})" if error is not None else ""
        self.log.say("error" if record.levelno >= logging.ERROR else "warning", message + cause)

    # ------------------------------------------------------------------------
    # While it runs

    async def _is_up(self) -> None:
        """Say so: to the person who started it, to systemd, to who waits for `ready`."""
        if warning := self.keys.warning():
            note(warning)
        names = " ".join(self.settings.models) or "models"
        urls = " and ".join(map(address, self._sockets))
        keys = "no API keys" if self.keys.path is None else f"API keys: {len(self.keys)}"
        note(" | ".join([f"serving {names} at {urls}", *self._says(), keys]))
        notify("READY=1")
        self.ready.set()

    def _beat(self) -> None:
        if self._is_healthy():
            notify("WATCHDOG=1")

    def _handlers(self) -> Mapping[str, Callable[[], None]]:
        on_terminal = any(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
        return {
            "SIGTERM": self._stop_by_signal,
            "SIGINT": self._interrupt,
            "SIGHUP": self._hang_up if on_terminal else self._reload,
        }

    def _interrupt(self) -> None:
        if sys.stderr.isatty():  # what comes next stands in place of the ^C, or below it
            with unheard():
                print(end=CLEAR_LINE if can_redraw(sys.stderr) else "\n", file=sys.stderr, flush=True)
        self._stop_by_signal()

    def _stop_by_signal(self) -> None:
        busy = self._server.busy
        if busy and not self._server.should_exit:
            requests = "1 request has" if busy == 1 else f"{busy} requests have"
            self.log.say(
                "info",
                f"stopping: {requests} {self.settings.drain:g} s left; a second signal ends it at once",
            )
        self.stop()

    def _hang_up(self) -> None:
        self._hung_up = True
        self.stop()

    def _reload(self) -> None:
        try:
            self.keys.reload()
        except (OSError, ValueError) as error:
            self.log.say("error", f"the API keys stay as they were: {error}")
        else:
            self.log.say("info", f"API keys read again: {len(self.keys)}")


def _cause(failure: Exception | None) -> BaseException:
    """Why an application did not start, for a person at its terminal, who may know more than a client."""
    if isinstance(failure, ApiError):
        return failure.__cause__ or RuntimeError(failure.message)
    return failure or RuntimeError("the server did not start")


class _Server(uvicorn.Server):
    """uvicorn's server without its signals, with a stop in two steps."""

    def __init__(
        self, config: uvicorn.Config, drain: float, is_up: Callable[[], Any], beat: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain, self._is_up, self._beat = drain, is_up, beat
        self._beats = _beat_interval()
        self._in_a_hurry = False

    @property
    def busy(self) -> int:
        """Requests under way."""
        return len(self.server_state.tasks)

    def ask_to_stop(self) -> None:
        self._in_a_hurry = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        await self._is_up()

    async def on_tick(self, counter: int) -> bool:
        if self._beats and counter % self._beats == 0:
            self._beat()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        notify("STOPPING=1")
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._wait(self._drain, lambda: self._in_a_hurry)
        for task in self.server_state.tasks:
            task.cancel()
        await self._wait(CANCELLING, lambda: False)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await self.lifespan.shutdown()

    async def _wait(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Until no request is under way and all answers have been taken; or that long; or it is enough."""
        end = asyncio.get_running_loop().time() + seconds
        state = self.server_state
        while (state.tasks or state.connections) and not enough():
            if asyncio.get_running_loop().time() >= end:
                return
            await asyncio.sleep(0.02)


# ----------------------------------------------------------------------------
# Sockets


def open_sockets(settings: Settings) -> list[socket.socket]:
    """Sockets that are bound but do not listen yet; from systemd or `fd` where there are some. ValueError or
    OSError.
    """
    handed = _handed_over()
    if settings.fd is not None:
        handed = [settings.fd]
    if handed:
        return [_adopt(fd) for fd in handed]
    where = f"{settings.host}:{settings.port}"
    sockets: list[socket.socket] = []
    try:
        port = settings.port
        for family, kind, protocol, _, place in _resolve(settings.host, port):
            # with its protocol, or asyncio does not turn Nagle off: then each answer, and each piece of a
            # stream, waits 40 ms for an acknowledgement
            listener = socket.socket(family, kind, protocol)
            sockets.append(listener)
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not _is_wildcard(settings.host))
            listener.bind((place[0], port, *place[2:]))
            port = port or listener.getsockname()[1]  # port 0: the second address gets the port of the first
    except OSError as error:
        for listener in sockets:
            listener.close()
        advice = "; --port N takes another one" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"{where}: {reason(error)}{advice}") from None
    return sockets


def _resolve(host: str, port: int) -> list[Any]:
    """The IPv4 addresses of a host, else those of IPv6: localhost may have one of these that the system does
    not.
    """
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    first = [place for place in found if place[0] == socket.AF_INET]
    return first or found


def _adopt(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise ValueError(f"file descriptor {fd} is no socket: {reason(error)}") from None
    if listener.type != socket.SOCK_STREAM:
        raise ValueError(f"file descriptor {fd} is no stream socket")
    return listener


def _handed_over() -> list[int]:
    """The descriptors of socket activation (sd_listen_fds), which are for this process alone."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    os.environ.pop("LISTEN_FDNAMES", None)
    count = os.environ.pop("LISTEN_FDS", "0")
    return list(range(FIRST_FD, FIRST_FD + int(count))) if count.isdecimal() else []


def _is_public(listener: socket.socket) -> bool:
    return listener.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(listener.getsockname()[0])


def _is_wildcard(host: str) -> bool:
    return host.strip("[]") in ("0.0.0.0", "::", "0")


def address(listener: socket.socket) -> str:
    """Where a socket is reached, for a person."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_files(connections: int) -> int:
    """Raise the soft limit of open files to what so many connections take, if the hard one lets us; the limit
    then.
    """
    try:
        import resource
    except ImportError:
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    wanted = connections + SPARE_FILES
    if soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
    return soft


# ----------------------------------------------------------------------------
# systemd, signals, what uvicorn says


def notify(state: str) -> None:
    """Tell systemd (sd_notify), if it wants to be told."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
        messenger.sendto(state.encode(), "\0" + where[1:] if where.startswith("@") else where)


def _beat_interval() -> int:
    """Ticks of uvicorn, ten a second, between two signs of life: half of what the watchdog allows; 0: there
    is none.
    """
    allowed = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return max(int(allowed) // 200_000, 1) if mine and allowed.isdecimal() and int(allowed) else 0


@contextlib.contextmanager
def _signals(handlers: Mapping[str, Callable[[], None]]) -> Iterator[None]:
    """Within, signals call these; one that the caller ignores (nohup) stays ignored. Only the main thread
    hears any.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name, handler in handlers.items():
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda *_, act=handler: _in_turn(act))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_turn(act: Callable[[], None]) -> None:
    """Call `act` from the event loop: a signal may come in the middle of a line that is being written."""
    try:
        asyncio.get_running_loop().call_soon_threadsafe(act)
    except RuntimeError:
        act()  # no loop runs yet, or any more


@contextlib.contextmanager
def _uvicorn_says(hear: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Within, the warnings of uvicorn and asyncio go to `hear` alone."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hear(record)

    handler = Handler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("uvicorn", "asyncio")]
    before = [(logger, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in before:
            logger.removeHandler(handler)
            logger.propagate = propagate
