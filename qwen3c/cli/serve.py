"""-m serve: options and a configuration file -> a server, and what is said before it is ready."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..system import terminal
from .command import concerning
from .named import model_file
from .options import model_by_default

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from ..model import Model
    from ..serve.api import Api
    from ..serve.app import Running
    from ..serve.ask import Stream
    from ..serve.config import ModelSettings, Settings
    from ..serve.models import Models, Served, ServeOptions
    from ..serve.upstream import Upstream

LIBRARIES = ("starlette", "uvicorn", "h11", "prometheus_client", "llguidance")
# option -> the setting that it sets
SETTINGS = {
    "host": "host",
    "port": "port",
    "fd": "fd",
    "api_keys": "api_keys_file",
    "max_gap": "max_gap",
    "cache_memory": "cache_memory",
    "queue": "queue",
    "running": "running",
    "cors_origin": "cors_origins",
    "allowed_host": "allowed_hosts",
    "drain": "drain",
    "log_json": "log_json",
    "metrics": "metrics",
    "idle_unload": "idle_unload",
    "context": "context",
    "threads": "threads",
    "kv": "kv",
    "isa": "isa",
    "huge_pages": "huge_pages",
    "model_alias": "models",
    "offline": "offline",
    "mcp": "mcp_servers",
    "draft": "draft",
    "drafts": "drafts",
}

UPSTREAM = {
    "upstream": "url", "upstream_model": "model", "upstream_requests": "requests_per_day",
    "upstream_tokens": "tokens_per_day", "upstream_state": "state_file",
    "upstream_insecure": "insecure", "upstream_env_proxy": "env_proxy",
}  # fmt: skip


def serve(args: argparse.Namespace) -> int:
    """Models behind HTTP until a signal ends it; with --print-config only the configuration, on stdout."""
    check_libraries("-m serve", LIBRARIES)
    from ..serve import config
    from ..serve.ask import KeyLimits
    from ..serve.keys import Keys
    from ..serve.service import Service, open_sockets
    from ..serve.surfaces.listing import STUCK

    settings = _settings(args)
    if args.print_config:
        print(config.to_toml(settings), end="")
        return 0
    with concerning(settings.api_keys_file or "API keys"):
        keys = Keys(settings.api_keys_file, KeyLimits(settings.key_running, settings.key_queue))
    settings = _with_files(settings, args.bits)
    sockets = open_sockets(settings)
    app, api = _application(settings, needs_key=keys.path is not None)
    service = Service(
        app, settings, sockets, keys,
        says=lambda: described(api.models),
        is_healthy=lambda: all(served.scheduler.is_alive(STUCK) for served in api.models.loaded),
        stopping=lambda: setattr(api, "draining", True),
    )  # fmt: skip
    return service.run()


def check_libraries(mode: str, libraries: Sequence[str]) -> None:
    """ImportError, in one line, if a library of the extra `serve` that a mode needs is missing."""
    needed = (*libraries, *(["tomli"] if sys.version_info < (3, 11) else []))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{mode} needs {' and '.join(missing)}: "
            "`pip install '.[serve]'` in the folder of qwen3c installs it"
        )


def _settings(args: argparse.Namespace) -> Settings:
    """Defaults, --config and flags. A model that is named on the command line comes first; without any, the
    usual one.
    """
    from ..serve import config

    flags: dict[str, Any] = {SETTINGS[dest]: getattr(args, dest) for dest in args.given if dest in SETTINGS}
    models = dict(flags.pop("models", ()))
    alias = ""
    if args.model:
        alias = _alias(args.model)
        models = {alias: args.model, **models}
        flags["default_model"] = alias
    if models:
        flags["models"] = models
    names = {setting: "--" + dest.replace("_", "-") for dest, setting in SETTINGS.items()}
    if args.upstream is not None:
        flags["upstream"] = {UPSTREAM[dest]: getattr(args, dest) for dest in args.given if dest in UPSTREAM}
        names["upstream"] = "--upstream"
    names["default_model"] = "MODEL"
    made = config.settings(args.config, flags, names)
    if made.models:
        return made
    path = model_file(model_by_default(), args.bits)
    alias = _alias(path)
    return config.settings(
        args.config, {**flags, "models": {alias: path}, "default_model": made.default_model or alias}, names
    )


def _with_files(settings: Settings, bits: str | None) -> Settings:
    """The same with the file of each model that is given by its name on the Hub."""

    def file(path: str) -> str:
        return path if os.path.isabs(path) else model_file(path, bits)

    models = {
        alias: dataclasses.replace(model, path=file(model.path), draft=model.draft and file(model.draft))
        for alias, model in settings.models.items()
    }
    return dataclasses.replace(settings, models=models, draft=settings.draft and file(settings.draft))


def _alias(path: str) -> str:
    """What a model is called that got no alias: the name in its file, as far as an alias may have it."""
    from ..format import ModelFile

    name = str(ModelFile(path).metadata["name"])
    return re.sub(r"[^A-Za-z0-9._:@/-]+", "-", name).strip("-./:@")[:64] or "model"


def _application(settings: Settings, needs_key: bool) -> tuple[Any, Api]:
    """The ASGI app over the models of the settings, the default one first, and what its endpoints share."""
    from .. import engine
    from ..drivers.draft import check_vocabulary
    from ..format import ModelFile
    from ..serve.api import Api
    from ..serve.app import create_app
    from ..serve.metrics import Metrics
    from ..serve.models import Models, ServeOptions

    if settings.isa:
        engine.set_isa(settings.isa)
    openers: dict[str, Callable[[], Model]] = {}
    sizes: dict[str, int] = {}
    files: dict[str, str] = {}
    for alias in sorted(settings.models, key=lambda alias: alias != settings.default_model):
        model, file = settings.models[alias], ModelFile(settings.models[alias].path)
        if settings.draft is not None and not openers:
            model = dataclasses.replace(model, draft=model.draft or settings.draft)
        files[alias], sizes[alias] = model.path, file.file_size
        if model.draft is not None:
            small = ModelFile(model.draft)
            check_vocabulary(file, small)
            sizes[alias] += small.file_size
        openers[alias] = functools.partial(_open, settings, model)
    options = ServeOptions(
        settings.running, settings.queue, settings.cache_memory, settings.max_gap, settings.context or None,
        settings.idle_unload, settings.drafts,
    )  # fmt: skip
    own = {alias: _options(options, model) for alias, model in settings.models.items()}
    api = Api(Models(openers, options, sizes, files, own), settings.ping, needs_key=needs_key)
    api.provider = _provider(settings)
    more: list[BaseRoute] = []
    running: list[Running] = []
    metrics = Metrics(lambda: api.models.loaded)
    api.models.worked = metrics.worked
    if settings.metrics:
        more += metrics.routes()
    if importlib.util.find_spec("mcp") is not None:
        from ..serve.mcp import mcp_routes

        routes, entered = mcp_routes(api.models, hosts=None)  # the guard has checked the host
        more, running, api.mcp = [*more, *routes], [*running, entered], True
    if settings.mcp_servers is not None:
        from ..serve.host import Host, host_routes, read_servers

        host = Host(read_servers(settings.mcp_servers))
        more, running = [*more, *host_routes(host)], [*running, lambda: host]

    def ended(request: Request, served: Served, stream: Stream) -> None:
        metrics.of(served.name).ended(stream)
        record = getattr(request.state, "record", None)
        if record is not None:
            record.tell(served.name, stream)

    api.ended = ended
    return create_app(api, more, running), api


def _provider(settings: Settings) -> Upstream | None:
    """Who is offered each chat first, if anybody is."""
    wanted = settings.upstream
    if wanted is None:
        return None
    from ..serve import upstream

    return upstream.Upstream(
        upstream.Settings(
            wanted.url, wanted.model, upstream.read_key(wanted.key_env), settings.offline, wanted.insecure,
            wanted.env_proxy, wanted.requests_per_day, wanted.tokens_per_day, wanted.connect_timeout,
            wanted.first_delta_timeout, wanted.silence_timeout, wanted.state_file,
        )
    )  # fmt: skip


def _options(options: ServeOptions, model: ModelSettings) -> ServeOptions:
    """How a model is served that may have settings of its own."""
    own: dict[str, Any] = {}
    if model.context is not None:
        own["context"] = model.context or None
    if model.cache_memory is not None:
        own["kv_bytes"] = model.cache_memory
    return dataclasses.replace(options, **own)


def _open(settings: Settings, model: ModelSettings) -> Model:
    """A model, and the smaller one that guesses at its next tokens, if there is one."""
    from ..model import Model
    from ..system.machine import default_threads

    threads, kv = model.threads or settings.threads or default_threads(), model.kv or settings.kv
    with terminal.waiting(f"loading {model.path}" + " into huge pages" * settings.huge_pages):
        made = Model(model.path, threads, kv, "int8", settings.huge_pages)  # type: ignore[arg-type]
        if model.draft is not None:
            made.draft_with(Model(model.draft, threads, kv, "int8", settings.huge_pages))  # type: ignore[arg-type]
    return made


def described(models: Models) -> list[str]:
    """What was chosen for the model that is loaded at the start."""
    from .. import engine
    from ..memory import gib

    served = models.loaded[0]
    return [
        f"context {served.context} of {served.model.config.context}",
        f"KV {served.model.kv}: {gib(served.scheduler.limits.kv_bytes)} in all",
        f"threads {served.model.threads}",
        engine.isa() + (" (QWEN3C_ISA)" if os.environ.get("QWEN3C_ISA") else ""),
    ]
